"""A run is decided once: every file opened, and the method built, one time."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_decoder_folder

from peftjax.train import method as methods
from peftjax.train import resolve as step
from peftjax.train.config import TrainConfig
from peftjax.train.fine_tune import fine_tune
from peftjax.train.options import DataOptions, MethodOptions, ModelOptions, RunOptions
from peftjax.train.resolve import resolve

OPENED: list[str] | None = None


def heard(event, arguments):
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


sys.addaudithook(heard)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_decoder_folder.save_decoder(folder)
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    tiny_decoder_folder.write_completions(data, 60)

    def options(method):
        return RunOptions(
            texts=DataOptions(data=str(data)),
            base=ModelOptions(model=str(folder)),
            tuning=MethodOptions(method=method),
            training=TrainConfig(batch_size=8, epochs=2.0),
            output=tmp_path_factory.mktemp("run"),
        )

    return options


@pytest.mark.parametrize("method", ["lora", "snella"])
def test_the_method_is_built_once_and_the_steps_are_counted_once(options, method, monkeypatch):
    calls = Counter()

    def counted(module, name):
        fn = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return fn(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(methods, "build")
    counted(step, "plan_steps")
    counted(step, "find_base")
    run = resolve(options(method))
    assert calls == {"build": 1, "plan_steps": 1, "find_base": 1}
    assert (run.task, run.method.name) == ("language", method)
    assert method == "lora" or run.method.config["total_steps"] == run.steps.total


@pytest.mark.slow
def test_a_run_opens_each_file_of_model_and_data_once(options, monkeypatch):
    given = options("lora")
    opened: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", opened)
    run = resolve(given)
    folder = Path(given.base.model)
    files = (folder / "config.json", folder / "tokenizer_config.json", Path(given.texts.data))
    of_run = {folder, files[-1].parent}
    assert Counter(path for path in opened if Path(path).parent in of_run) == Counter(map(str, files))
    opened.clear()
    fine_tune(run)
    assert str(folder / "config.json") not in opened
