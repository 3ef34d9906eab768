"""The registry: every method by its name, as `register` adds it where its factory is defined.

A method of this library is one file and its import in `peftjax/methods/__init__.py`. One of another package
is a factory with the same decorator and an entry point of the group "peftjax.methods":

    [project.entry-points."peftjax.methods"]
    mymethod = "mypackage.mymethod:mymethod"
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Literal, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.io.files import checked
from peftjax.transform.chain import chain
from peftjax.transform.options import check_options, methods_among, require_shallow
from peftjax.transform.transform import Transform

Kind = Literal["adapter", "selection", "companion", "rewrite", "optimizer"]
"""What a method is.

- `adapter`: trains numbers of its own, beside the frozen weights or instead of them.
- `selection`: trains some parameters, or rows of them, as they are.
- `companion`: trains nothing, and goes beside another method in a chain.
- `rewrite`: trains nothing, and gives the base another form beneath another method (quantized, pruned).
- `optimizer`: trains all weights of the model, by an optimizer that keeps less for each.
"""
GROUP = "peftjax.methods"
"""Of the entry points by which other packages add methods."""
ALIASES = {"train": "unfreeze"}
"""Names of earlier versions, by which saved adapters may call a method."""

Options = ParamSpec("Options")


@dataclass(frozen=True)
class Conformance:
    """What the conformance tests have to know of a method.

    Attributes:
        example: options for tiny models.
        starts_as_base: whether a fresh adapter leaves the model's outputs as they were.
        reads_classifier: whether it works on models with a classifier only.
    """

    example: Mapping[str, Any] = field(default_factory=dict)
    starts_as_base: bool = True
    reads_classifier: bool = False


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method: enough for the README, the command line and the tests.

    Attributes:
        name: its name, that of its factory.
        factory: makes the `Transform`, all options by keyword.
        kind: what it is; see `Kind`.
        paper: title or names, year and arXiv number.
        trains: what is trained, per weight `[in, out]`.
        backward_keeps: the residuals for an adapted layer, beside those of the frozen model.
        mergeable: whether `merge` gives a model with the same outputs.
        quantized_base: whether it works on a base that is not a plain array.
        replaces_base: whether `init` replaces an adapted array by another one.
        of_blocks: whether it rewrites the blocks of a backbone, and so works on no other model.
        of_steps: options that follow from how many optimizer steps a run has; the command line gives them.
        conformance: what its tests have to know.
    """

    name: str
    factory: Callable[..., Transform]
    kind: Kind
    paper: str
    trains: str
    backward_keeps: str
    mergeable: bool = True
    quantized_base: bool = True
    replaces_base: bool = False
    of_blocks: bool = False
    of_steps: Callable[[int], Mapping[str, Any]] | None = None
    conformance: Conformance = field(default_factory=Conformance)


class _Methods(Mapping[str, MethodInfo]):
    """Every method by its name.

    Those of other packages are imported when one is looked up that is not here, or when all are listed.
    """

    def __init__(self) -> None:
        self._known: dict[str, MethodInfo] = {}
        self._failed: dict[EntryPoint, str] = {}

    def __getitem__(self, name: str) -> MethodInfo:
        if name not in self._known:
            for point in _points(tuple(sys.path)).select(name=name):
                if failure := self._load(point):
                    raise PeftError(failure)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        for point in _points(tuple(sys.path)):
            if failure := self._load(point):
                warnings.warn(failure, stacklevel=2)
        return iter(dict(self._known))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, info: MethodInfo) -> None:
        """Add a method; of the same function, as when a cell is run again, the new one counts.

        Raises:
            PeftError: another one has its name.
        """
        known = self._known.get(info.name)
        if info.name == "chain" or info.name in ALIASES:
            raise PeftError(f"register: the name {info.name!r} is taken; choose another one")
        if known is not None and known.factory.__module__ != info.factory.__module__:
            raise PeftError(
                f"register: {known.factory.__module__} has a method {info.name!r} already; give that of "
                f"{info.factory.__module__} another name"
            )
        self._known[info.name] = info

    def _load(self, point: EntryPoint) -> str | None:
        """Import what an entry point names, which adds it; why that failed."""
        if point not in self._failed:
            package = f"package {point.dist.name!r}" if point.dist else f"entry point {point.value!r}"
            what = f"the method {point.name!r} of the {package} cannot be used"
            try:
                factory = point.load()
            except Exception as error:
                self._failed[point] = f"{what}: {point.value} fails with {error!r}; update or remove it"
            else:
                known = self._known.get(point.name)
                if known is None or known.factory is not factory:
                    self._failed[point] = f"{what}: {point.value} is not registered under this name"
        return self._failed.get(point)


METHODS = _Methods()


@functools.cache
def _points(path: tuple[str, ...]) -> EntryPoints:
    """The entry points of the packages on the path."""
    return entry_points(group=GROUP)


def register(
    *,
    kind: Kind,
    paper: str,
    trains: str,
    backward_keeps: str,
    mergeable: bool = True,
    quantized_base: bool = True,
    replaces_base: bool = False,
    of_blocks: bool = False,
    of_steps: Callable[[int], Mapping[str, Any]] | None = None,
    conformance: Conformance | None = None,
) -> Callable[[Callable[Options, Transform]], Callable[Options, Transform]]:
    """Add a factory to the registry, under its own name; the arguments are those of `MethodInfo`.

    The method that a call makes has the factory's name, and as its `config` the options of the call, defaults
    included; arrays, which a file of options cannot hold, are None there. What the factory itself puts into
    `config` wins.

    Raises:
        PeftError: another method has the name.
    """

    def add(factory: Callable[Options, Transform]) -> Callable[Options, Transform]:
        name, signature = factory.__name__, inspect.signature(factory)

        @functools.wraps(factory)
        def recorded(*args: Options.args, **options: Options.kwargs) -> Transform:
            method = factory(*args, **options)
            given = signature.bind(*args, **options)
            given.apply_defaults()
            kept = {option: None if _is_data(v) else v for option, v in given.arguments.items()}
            own = method.config if method.name == name else {}  # not that of a method it is made of
            return replace(method, name=name, config=_plain({**kept, **own}))

        METHODS.add(
            MethodInfo(
                name,
                recorded,
                kind,
                paper,
                trains,
                backward_keeps,
                mergeable,
                quantized_base,
                replaces_base,
                of_blocks,
                of_steps,
                conformance or Conformance(),
            )
        )
        return recorded

    return add


def _is_data(value: Any) -> bool:
    """Whether an option is an array, or a tree of them, and not one of whole numbers, such as of rows."""
    leaves = [] if isinstance(value, Transform) else jax.tree.leaves(value)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
    return any(not jnp.issubdtype(array.dtype, jnp.integer) for array in arrays)


def _plain(value: Any) -> Any:
    """The value of an option as JSON has it."""
    if isinstance(value, Transform):
        return describe(value)
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return value
    return [_plain(own) for own in value]


@dataclass(frozen=True)
class _Chain:
    """The options of a chain."""

    methods: list[dict[str, Any]] = field(default_factory=list)


def find_method(name: object) -> MethodInfo:
    """What the registry knows of a method.

    Raises:
        PeftError: no method is called so.
    """
    if not isinstance(name, str) or ALIASES.get(name, name) not in METHODS:
        raise PeftError(f"no method is called {name!r}; closest: {nearest(str(name), METHODS)}")
    return METHODS[ALIASES.get(name, name)]


def build(config: Mapping[str, Any]) -> Transform:
    """The method that a saved configuration describes: `{"name": ..., option: value, ...}`.

    An option that is a method is a configuration too, or the method itself.

    Raises:
        PeftError: the name or an option is unknown, an option is missing, of another type or out of range, or
            methods nest too deeply.

    Examples:
        >>> pj.build({"name": "unfreeze", "targets": ["head"]}).name
        'unfreeze'
    """
    require_shallow(config)
    options = dict(config)
    name = options.pop("name", None)
    if name == "chain":
        return chain(*map(build, checked(_Chain, options, "chain").methods))
    factory = find_method(name).factory
    check_options(name, factory, options)
    inner = {option: build(options[option]) for option in methods_among(factory, options)}
    # A chain's arrays are saved under the names of its methods: the saved name stays.
    return replace(factory(**{**options, **inner}), name=name)


def describe(method: Transform) -> dict[str, Any]:
    """The configuration from which `build` makes the same method; plain JSON values.

    Examples:
        >>> pj.describe(pj.bitfit())
        {'name': 'bitfit'}
    """
    return {"name": method.name, **method.config}
