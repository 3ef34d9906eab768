"""Checkpoints of a run: everything that the next step depends on, written by Orbax.

A checkpoint is a folder `<step>/` with three items: `trainable` (arrays by path), `optimizer`
(optimizer state and the run's PRNG key, arrays by path) and `run` (step, data iterator and early
stopping, JSON), and `checksums.json` over their files. It is written in the background under a
temporary name and renamed when it is complete, so the newest one is never half-written; one that was
damaged later is found by its checksums, set aside, and the newest whole one taken instead.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Key, PyTree

from peftjax.core.errors import LostProcess, PeftError
from peftjax.io import checksums
from peftjax.io.files import checked
from peftjax.io.unreadable import (
    COMPLETE,
    Unreadable,
    none_whole,
    set_aside,
    set_unreadable_aside,
    what_is_wrong,
)

Checkpoints = ocp.CheckpointManager
"""The checkpoints of one run; `open_checkpoints` makes it."""

_ARRAY_ITEMS = ("trainable", "optimizer")
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax's names of folders end that are being written
_REFUSALS = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
)
# Orbax writes into them when the checksums are recorded already; nothing of a run is in them.
_WITHOUT_CHECKSUM = (COMPLETE, "commit_success.txt")


@dataclass(frozen=True)
class RunState:
    """What a run needs to continue as if it had never stopped."""

    trainable: PyTree[Array]
    opt_state: PyTree[Array]
    key: Key[Array, ""]
    """The run's key; step t uses `fold_in(key, t)`."""
    step: int
    """Steps done."""
    data: dict[str, Any]
    """State of the data iterator, JSON-able."""
    progress: dict[str, Any]
    """Best evaluation so far and patience used, JSON-able."""


@dataclass(frozen=True)
class BestScores:
    """Keeps the `n` checkpoints with the highest score, the earlier of equals."""

    n: int

    def should_preserve(
        self, checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo], *, context: Any
    ) -> list[bool]:
        """Whether to keep each checkpoint; one without a score is never a best one."""
        scores = {info.step: (info.metrics or {}).get("score") for info in checkpoints}
        scored = [step for step, score in scores.items() if score is not None]
        kept = sorted(scored, key=lambda step: (-scores[step], step))[: self.n]
        return [info.step in kept for info in checkpoints]


@contextmanager
def open_checkpoints(directory: str | Path, *, keep_last: int, keep_best: int) -> Iterator[Checkpoints]:
    """The checkpoints in `directory`; at the end pending writes are waited for.

    Args:
        directory: made where absent; interrupted writes in it are removed, and folders that are
            damaged or incomplete set aside as `<step>.unreadable` and `<step>.incomplete`.
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: checkpoints with the highest score to keep (the earlier of equals), besides.

    Raises:
        PeftError: there are checkpoints, and none is whole; or the last one cannot be written.
    """
    directory = Path(directory).absolute()
    last = ocp.checkpoint_managers.LatestN(keep_last)
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["score"],  # without it Orbax does not write the scores
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([last, BestScores(keep_best)]),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _record_checksums(directory)),
    )
    set_unreadable_aside(directory)
    handlers = {name: ocp.StandardCheckpointHandler() for name in _ARRAY_ITEMS}
    with _writing(directory), _opening(directory):
        manager = ocp.CheckpointManager(
            directory,
            options=options,
            item_handlers={**handlers, "run": ocp.JsonCheckpointHandler()},
        )
    lost = False
    try:
        yield manager
    except LostProcess:
        lost = True
        raise
    finally:
        if not lost:  # a checkpoint that is being written would wait for it
            with _writing(directory):
                manager.close()


def _record_checksums(directory: Path) -> None:
    """Orbax calls it when all files are written, before it gives their folder its name."""
    if jax.process_index() == 0:
        for folder in directory.glob(f"*{_UNFINISHED}"):
            checksums.record(folder, leave_out=_WITHOUT_CHECKSUM)


def save(checkpoints: Checkpoints, state: RunState, score: float | None = None) -> None:
    """Start writing a checkpoint; the arrays may be donated as soon as this returns.

    Args:
        checkpoints: of the run.
        state: to write.
        score: an evaluation's result, higher is better; without one it cannot be a best one.

    Raises:
        PeftError: it or the one before cannot be written: the disk is full, the folder read-only.
    """
    with _writing(checkpoints.directory):
        checkpoints.save(
            state.step,
            metrics={"score": None if score is None else float(score)},
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(arrays_by_path(state.trainable)),
                optimizer=ocp.args.StandardSave(arrays_by_path((state.opt_state, state.key))),
                run=ocp.args.JsonSave({"step": state.step, "data": state.data, "progress": state.progress}),
            ),
        )


@contextmanager
def _writing(directory: object) -> Iterator[None]:
    """Raise a PeftError for what the system refuses Orbax, now or in the background since the last call."""
    try:
        yield
    except Exception as error:
        if (reason := _refusal(error)) is None:
            raise
        raise PeftError(
            f"cannot write a checkpoint to {directory}: {reason}; the earlier ones are whole: make room or "
            "allow writing there, and the same command goes on from the newest"
        ) from error


def _refusal(error: BaseException | None) -> str | None:
    """The operating system's reason in an error or in what it came from; TensorStore has it in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        for reason in _REFUSALS:
            if reason in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None


def restore_latest(checkpoints: Checkpoints, like: RunState) -> RunState | None:
    """The newest whole checkpoint, or None where there is none; unreadable newer ones are set aside.

    Args:
        checkpoints: of the run.
        like: a state with the same trees, shapes, dtypes and shardings; its values are not read.

    Raises:
        PeftError: the checkpoint is of another model or method: names the first difference; or there are
            checkpoints, and none can be read.
    """
    wanted = {
        "trainable": abstract_by_path(like.trainable),
        "optimizer": abstract_by_path((like.opt_state, like.key)),
    }
    while steps := complete_steps(checkpoints):
        folder = Path(checkpoints.directory) / str(steps[-1])
        try:
            found = _restore(checkpoints, steps[-1], wanted)
            break
        except Unreadable as error:
            if len(steps) == 1:
                raise PeftError(none_whole(folder.parent, {folder: str(error)})) from error
            set_aside(folder, str(error))
            checkpoints.reload()
    else:
        return None
    opt_state, key = _with_structure(found["optimizer"], (like.opt_state, like.key))
    return RunState(
        trainable=_with_structure(found["trainable"], like.trainable),
        opt_state=opt_state,
        key=key,
        **found["run"],
    )


def restore_trainable(checkpoints: Checkpoints, step: int, like: PyTree[Array]) -> PyTree[Array]:
    """The trainable arrays of the checkpoint at `step`; `like` as in `restore_latest`.

    Raises:
        PeftError: there is no such checkpoint, it is damaged, or it is of another model or method.
    """
    steps = complete_steps(checkpoints)
    if step not in steps:
        raise PeftError(
            f"{checkpoints.directory} has no checkpoint of step {step}; it has those of steps "
            f"{', '.join(map(str, steps)) or '(none)'}"
        )
    try:
        found = _restore(checkpoints, step, {"trainable": abstract_by_path(like)})
    except Unreadable as error:
        raise PeftError(
            f"the checkpoint of step {step} in {checkpoints.directory} is unreadable: {error}"
        ) from error
    return _with_structure(found["trainable"], like)


def complete_steps(checkpoints: Checkpoints) -> list[int]:
    """The steps of the checkpoints, ascending, after waiting for the one being written.

    Raises:
        PeftError: that one cannot be written.
    """
    with _writing(checkpoints.directory):
        checkpoints.wait_until_finished()
    return sorted(checkpoints.all_steps())


@dataclass(frozen=True)
class _Run:
    """The item `run` of a checkpoint."""

    step: int
    data: dict[str, Any]
    progress: dict[str, Any]


def _restore(checkpoints: Checkpoints, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint: those `wanted`, and the fields of `run`.

    Raises:
        Unreadable: it is not as it was written, or (of one without checksums) Orbax cannot read it.
        PeftError: an array is of another shape or dtype.
    """
    reason = what_is_wrong(Path(checkpoints.directory) / str(step))
    if reason is not None:
        raise Unreadable(reason)
    with _reading():
        metadata = checkpoints.item_metadata(step)
        saved = {name: dict(metadata[name].items()) for name in wanted}
    for name, arrays in wanted.items():
        difference = first_difference(saved[name], arrays)
        if difference is not None:
            raise PeftError(
                f"{checkpoints.directory} holds a checkpoint of another model or method: {name} "
                f"{difference}; choose another output folder, or the options it was made with"
            )
    items = {name: ocp.args.StandardRestore(arrays) for name, arrays in wanted.items()}
    with _reading():
        found = checkpoints.restore(step, args=ocp.args.Composite(**items, run=ocp.args.JsonRestore()))
        run = checked(_Run, found["run"], "run/metadata")
    return {
        **{name: found[name] for name in wanted},
        "run": {f.name: getattr(run, f.name) for f in fields(run)},
    }


@contextmanager
def _opening(directory: Path) -> Iterator[None]:
    """Orbax reads small files of all checkpoints when it starts, and may ask more of them than we know."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise PeftError(
            f"the checkpoints in {directory} cannot be opened: {what}; move that folder away to train from "
            "the start"
        ) from error


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever Orbax ends with on files that it cannot read becomes `Unreadable`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unreadable(lines[0][:200]) from error


def first_difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """A sentence on the first path, in sorted order, whose array differs in shape or dtype."""
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = (_describe(arrays.get(path)) for arrays in (saved, wanted))
        if old != new:
            return f"'{path}' is {old} in the checkpoint and {new} in this run"
    return None


def _describe(array: Any) -> str:
    return "absent" if array is None else f"{np.dtype(array.dtype).name}{list(array.shape)}"


def arrays_by_path(tree: PyTree[Array]) -> dict[str, Array]:
    """A tree's arrays by path, such as `blocks/query/a`; PRNG keys as their key data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): _plain(leaf) for path, leaf in leaves}


def abstract_by_path(tree: PyTree[Array]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of `arrays_by_path(tree)`."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays_by_path(tree))


def _with_structure(arrays: dict[str, Array], like: PyTree[Array]) -> PyTree[Array]:
    """`arrays_by_path` undone: a tree like `like` with the values of `arrays`."""

    def put_back(path: tuple[Any, ...], leaf: Array) -> Array:
        value = arrays[_name(path)]
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(put_back, like)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _plain(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
