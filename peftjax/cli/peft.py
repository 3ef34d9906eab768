"""`peftjax export` and `peftjax import`: adapters written for, and read from, Hugging Face's PEFT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from peftjax.adapters.files import save_adapter
from peftjax.cli.report import print_values, show
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.hf.config import read_config
from peftjax.hf.export import export_peft
from peftjax.hf.forms.read import form_of, read_form_config, read_form_file
from peftjax.hf.load import import_peft
from peftjax.hf.names import Names, module_of, names_of
from peftjax.hf.prefix import is_prefix
from peftjax.hf.tensors import Tensors, read_file
from peftjax.models.family import Family, Head
from peftjax.models.load import lacking, load
from peftjax.models.shared import untied
from peftjax.train.config import DEFAULTS, require_numbers
from peftjax.train.open import LANGUAGE_HEAD, find_base
from peftjax.train.saved_adapter import open_tuned


@dataclass(frozen=True)
class Export:
    """Write a trained adapter in the format of Hugging Face's PEFT."""

    output: Path
    """The folder to write, for PeftModel.from_pretrained."""
    adapter: Path = Path("outputs/adapter")
    """The adapter's folder."""
    model: str | None = None
    """The base model's folder, where it is not the one the adapter was trained on."""
    base: str | None = None
    """The base model's name to write into the configuration; by default its folder."""
    leave_out: tuple[str, ...] = ()
    """Parameters or modules that are not written though they are trained, such as 'head'."""
    untie: bool = False
    """Load a tied output layer as a parameter of its own, where the adapter does not say so itself."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class Import:
    """Read an adapter of Hugging Face's PEFT into a folder for eval, merge and export."""

    peft: Path
    """The folder with adapter_config.json and adapter_model.safetensors."""
    model: str
    """The base model: a Hugging Face folder, or 'minilm'."""
    output: Path = Path("outputs/adapter")
    """The adapter's folder to write."""
    head: str | None = None
    """The model's head; by default the one of the adapter's task and class."""
    labels: tuple[str, ...] = ()
    """The labels' names in the order of the classifier's outputs; by default the base model's."""
    max_length: int | None = None
    """Tokens of a text at most, when the adapter is evaluated; by default its task's."""
    leave_out: tuple[str, ...] = ()
    """Modules of the file that are not read."""
    vocab_size: int | None = None
    """Resize the base model's vocabulary to so many tokens, as the adapter's training did."""
    untie: bool = False
    """Load the model with a tied output layer as a parameter of its own, for an adapter that changes it apart
    from the word table."""
    json: bool = False
    """Print the result as JSON."""


def run_export(command: Export, console: Console) -> None:
    """Write PEFT's folder, and print where it is."""
    export_saved(
        command.adapter,
        command.output,
        model=command.model,
        base=command.base,
        leave_out=command.leave_out,
        untie=command.untie,
    )
    result = {"adapter": str(command.adapter), "exported": str(command.output)}
    show(command.json, result, lambda: print_values(result))


def run_import(command: Import, console: Console) -> None:
    """Write the adapter, and print where it is and what it became."""
    result = import_saved(
        command.peft,
        command.model,
        command.output,
        head=command.head,
        labels=command.labels,
        max_length=command.max_length,
        leave_out=command.leave_out,
        untie=command.untie,
        vocab_size=command.vocab_size,
    )
    show(command.json, result, lambda: print_values(result))


def export_saved(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    base: str | None = None,
    leave_out: Sequence[str] = (),
    untie: bool = False,
) -> Path:
    """Write a saved adapter as a folder for `PeftModel.from_pretrained`.

    Parameters that the base's checkpoint lacks are written too, frozen or not: PEFT would draw others.

    Args:
        adapter: the folder that `train` or `import_saved` wrote.
        output: the folder to write.
        model: the base model's folder, where it has moved since.
        base: the base model's name in the adapter's configuration; by default its folder.
        leave_out: paths that are not written though they are trained.
        untie: as of `open_tuned`.

    Raises:
        PeftError: as `open_tuned` and `export_peft`.
    """
    tuned = open_tuned(adapter, model, untie=untie)
    held = tuned.adapter
    _, initial = held.method.init(jax.random.key(held.seed), tuned.params)
    export_peft(
        output,
        tuned.model,
        held.method,
        held.frozen,
        held.trainable,
        base=base or str(tuned.folder),
        initial=initial,
        also=lacking(tuned.folder, tuned.model, untie=tuned.untied),
        leave_out=leave_out,
    )
    return output


def import_saved(
    peft: Path,
    model: str,
    output: Path,
    *,
    head: str | None = None,
    labels: Sequence[str] = (),
    max_length: int | None = None,
    leave_out: Sequence[str] = (),
    untie: bool = False,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Write an adapter of PEFT's as a folder that `eval`, `merge` and `export` take.

    Args:
        peft: the folder with `adapter_config.json`.
        model: the base model's folder, or 'minilm'.
        output: the folder to write.
        head: the head of our model; by default the one of the adapter's task and class.
        labels: the labels' names in the order of the classifier's outputs; by default the base's.
        max_length: tokens of a text at most, when the adapter is evaluated; by default the task's.
        leave_out: modules of the file that are not read.
        untie: as of `load`, for an adapter that changes a tied output layer apart from the word table.
        vocab_size: as of `load`, for an adapter that was trained with a resized vocabulary.

    Returns:
        What was made: the adapter's folder, its method and its head.

    Raises:
        PeftError: as `load` and `import_peft`; it is not clear which head is meant; the labels are not
            as many as the classifier's outputs.
    """
    require_numbers({"max_length": max_length})
    found = find_base(model)
    folder, family = found.folder, found.family
    config = family.read_config(found.config)
    if head is not None and head not in family.heads:
        raise PeftError(f"{folder} has no head {head!r}; closest: {nearest(head, family.heads)}")
    outputs, replaced = None, set()
    if is_prefix(peft):
        head = head or LANGUAGE_HEAD
    else:
        task, file = _read(peft, leave_out)
        head = head or _head_of(peft, file, task, family, config)
        names = _names(family, untied(family, config, head) if untie else config, head)
        outputs = _outputs(file, names, family.heads[head])
        replaced = {
            slot.path for name in file.plain if (slot := names.slots.get(names.canonical(name))) is not None
        }
    spec = family.heads[head]
    if labels and len(labels) != outputs:
        raise PeftError(f"{len(labels)} labels were given; the classifier has {outputs or 'no'} outputs")
    backbone, params = load(
        folder,
        head=head,
        num_labels=outputs,
        redraw_head=True,
        vocab_size=vocab_size,
        untie=untie,
        key=jax.random.key(0),
        replaced=replaced,
        described=(family, found.config),
    )
    method, frozen, trainable = import_peft(peft, backbone, params, leave_out=leave_out, freeze_tables=False)
    known = list(labels or backbone.config.labels) if spec.labeled else []
    purpose = "language" if head == LANGUAGE_HEAD else "classification"
    info = {
        "model": model,
        "head": head,
        "task": purpose,
        "labels": known,
        "max_length": max_length or DEFAULTS[purpose]["max_length"],
        **({} if vocab_size is None else {"vocab_size": vocab_size}),
        **({"untied": True} if untie else {}),
    }
    save_adapter(output, method, frozen, trainable, seed=0, info=info)
    return {"adapter": str(output), "method": method.name, "head": head}


def _names(family: Family, config: Any, head: str) -> Names:
    model = family.build(config, head=head)
    return names_of(model, jax.eval_shape(model.init, jax.random.key(0)))


def _read(folder: Path, leave_out: Sequence[str]) -> tuple[str | None, Tensors]:
    """The task of an adapter's configuration, and its tensors."""
    if (form := form_of(folder)) is not None:
        return read_form_config(form, folder)[0].task, read_form_file(form, folder, leave_out)
    return read_config(folder).task, read_file(folder, leave_out)


def _head_of(peft: Path, file: Tensors, task: str | None, family: Family, config: Any) -> str:
    """The head of the adapter's task and class that has a place for every tensor of the file."""
    spelt = {*file.plain, *(f"{module}.weight" for module in file.factors)}
    bare = any(family.canonical(name) == f"{family.prefix}{name}" for name in spelt)
    fitting = {
        name: spec
        for name, spec in family.heads.items()
        if spec.bare == bare and (task is None or spec.task == task)
        if _fits(spelt, _names(family, config, name))
    }
    # The heads of a bare class have the same tensors, and differ in what is made of its output.
    if not fitting or (len(fitting) > 1 and not bare):
        how_many = "several heads fit" if fitting else "no head fits"
        raise PeftError(
            f"{peft}: {how_many} the adapter's task {task!r} and its tensors; choose one of "
            f"{', '.join(family.heads)}"
        )
    return next(iter(fitting))


def _fits(spelt: set[str], names: Names) -> bool:
    known = names.slots.keys() | names.tied.keys()
    return all(names.canonical(name) in known for name in spelt)


def _outputs(file: Tensors, names: Names, head: Head) -> int | None:
    """How many labels the classifier in the file has; None where the file has none."""
    if not head.labeled:
        return None
    classifier = {name for name, slot in names.slots.items() if slot.path.startswith(head.task_weights or "")}
    sizes: Mapping[str, int] = {
        **{module_of(name): len(tensor) for name, tensor in file.plain.items()},
        **{name: len(own["lora_B.weight"]) for name, own in file.factors.items() if "lora_B.weight" in own},
    }
    found = [size for module, size in sizes.items() if names.canonical(f"{module}.weight") in classifier]
    return found[0] if found else None
