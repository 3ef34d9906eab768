"""The registry: methods of other packages, and what `register` records."""

import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.transform import registry

METHOD = """
import peftjax as pj


@pj.register(kind="selection", paper="a test", trains="scales", backward_keeps="nothing")
def {name}(*, ending: str = "scale") -> pj.Transform:
    return pj.unfreeze([ending])
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put packages with entry points where Python looks for them; afterwards they never were there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "METHODS", pj.METHODS)
    monkeypatch.setattr(pj.METHODS, "_known", dict(pj.METHODS._known))
    monkeypatch.setattr(pj.METHODS, "_failed", {})
    written = []

    def package(name, text, points):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{point} = {target}" for point, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[peftjax.methods]", *lines, ""]))
        written.append(name)
        registry._points.cache_clear()

    yield package
    registry._points.cache_clear()
    for name in written:
        sys.modules.pop(name, None)


def test_a_method_of_another_package_is_imported_when_it_is_asked_for(install):
    install("scaling", METHOD.format(name="scales"), {"scales": "scaling:scales"})
    method = pj.build({"name": "scales", "ending": "norm/scale"})
    assert "scaling" in sys.modules
    assert pj.METHODS["scales"].kind == "selection"
    assert pj.describe(method) == {"name": "scales", "ending": "norm/scale"}
    _, trainable = method.init(jax.random.key(0), {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}})
    assert list(trainable) == ["norm/scale"]
    with pytest.raises(PeftError, match=r"scales: unknown option 'endin'; closest: 'ending'"):
        pj.build({"name": "scales", "endin": "x"})


def test_lists_have_it(install):
    before = list(pj.METHODS)
    install("scaling", METHOD.format(name="scales"), {"scales": "scaling:scales"})
    assert "scaling" not in sys.modules
    assert list(pj.METHODS) == [*before, "scales"]
    assert len(pj.METHODS) == len(before) + 1


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("import nothing_of_this_name", "broken:scales", "No module named 'nothing_of_this_name'"),
        ("", "broken:scales", "has no attribute 'scales'"),
        (METHOD.format(name="others"), "broken:others", "broken:others is not registered under this name"),
        ("from peftjax import lora as scales", "broken:scales", "is not registered under this name"),
    ],
)
def test_a_package_that_does_not_work_is_named(install, text, target, message):
    install("broken", text, {"scales": target})
    with pytest.raises(PeftError, match=rf"'scales' of the package 'broken' cannot be used: .*{message}"):
        pj.build({"name": "scales"})
    with pytest.warns(UserWarning, match="package 'broken'"):
        assert "lora" in list(pj.METHODS)
    assert pj.build({"name": "lora"}).name == "lora"


def test_a_name_is_registered_once(install):
    factory = pj.METHODS["lora"].factory
    install("again", METHOD.format(name="lora"), {"lora": "again:lora"})
    with pytest.warns(UserWarning, match=r"package 'again'.* peftjax\.methods\.lowrank\.lora has a method"):
        list(pj.METHODS)
    assert pj.METHODS["lora"].factory is factory is pj.lora


@pytest.mark.parametrize("name", ["chain", "train"])
def test_names_that_configurations_use_are_taken(name):
    def method():
        raise AssertionError

    method.__name__ = name
    with pytest.raises(PeftError, match=f"the name '{name}' is taken"):
        pj.register(kind="adapter", paper="", trains="", backward_keeps="")(method)
    assert name not in list(pj.METHODS)


def test_a_function_defined_again_takes_its_own_place(install):
    def scales() -> pj.Transform:
        return pj.bitfit()

    add = pj.register(kind="selection", paper="", trains="", backward_keeps="")
    add(scales)
    assert pj.METHODS["scales"].factory is not add(scales)


@pytest.mark.parametrize("info", pj.METHODS.values(), ids=lambda info: info.name)
def test_every_factory_is_exported_with_all_of_its_options_typed(info):
    assert getattr(pj, info.name) is info.factory
    assert info.name in pj.__all__
    parameters = inspect.signature(info.factory).parameters.values()
    assert all(p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    assert all(p.annotation is not p.empty for p in parameters)
    described = inspect.getdoc(info.factory)
    assert all(re.search(rf"\b{p.name}:|`{p.name}`", described) for p in parameters)


def test_signatures_show_the_options_of_a_family():
    assert inspect.signature(pj.dora).parameters["rank"].default == 8
    assert "init" in inspect.signature(pj.lora_plus).parameters
    assert "init" not in inspect.signature(pj.dora).parameters
    assert "rslora" not in inspect.signature(pj.rslora).parameters


def test_a_configuration_has_the_options_given_and_the_defaults_and_none_for_arrays():
    config = pj.lora(rank=3, layers=np.arange(2), targets=("up", "down")).config
    assert (config["rank"], config["alpha"]) == (3, 16.0)
    assert (config["layers"], config["targets"]) == ([0, 1], ["up", "down"])
    config = pj.shira(mask="gradient", gradients={"up": jnp.ones((2, 2))}).config
    assert config["mask"] == "loaded"
    assert config["gradients"] is None


def test_a_method_inside_another_is_a_configuration_too():
    method = pj.lst(side=pj.chain(pj.lora(rank=2), pj.unfreeze(["norm"])))
    described = pj.describe(method)
    assert [inner["name"] for inner in described["side"]["methods"]] == ["lora", "unfreeze"]
    assert pj.describe(pj.build(described)) == described
    with pytest.raises(PeftError, match="no method is called 'lroa'"):
        pj.build({"name": "lst", "side": {"name": "lroa"}})
