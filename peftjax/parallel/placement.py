"""Arrays put where rules say: parameters, what a method adds to them, the optimizer's state, a batch."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax.core import tree
from peftjax.core.mesh_axes import ROWS, TOKENS
from peftjax.optim.coded_sharding import shardings_like
from peftjax.parallel.processes import put
from peftjax.parallel.rules import Rules, fitting, names_of, shardings, spec_of

T = TypeVar("T")


def shard(params: T, mesh: Mesh, rules: Rules | None = None) -> T:
    """The parameters of a model, divided over a mesh.

    Args:
        params: arrays; weights that are codes stay codes.
        mesh: one of `make_mesh`.
        rules: by default those of the backbones, `BLOCKS`; of a model of your own, pairs of a pattern and the
            mesh axes of the parameter's last axes.

    Raises:
        PeftError: as `shardings`.

    Examples:
        >>> mesh = pj.parallel.make_mesh("fsdp=1", jax.devices()[:1])
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> params = pj.parallel.shard(params, mesh, [(".*/kernel", ("fsdp", "tensor"))])
        >>> tuple(params["up"]["kernel"].sharding.spec)
        ('fsdp', 'tensor')
    """
    return jax.tree.map(put, params, shardings(params, mesh, rules))


def shard_batch(batch: T, mesh: Mesh) -> T:
    """A batch on a mesh: rows over `data`, `fsdp` and `expert`, tokens over `sequence`, where they divide."""
    return jax.tree.map(put, batch, batch_shardings(batch, mesh))


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Where each array of a batch lies; `batch` may be of shapes."""

    def place(leaf: Any) -> NamedSharding:
        axes = [fitting(size, own, mesh) for size, own in zip(leaf.shape, (ROWS, TOKENS))]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(place, batch)


def shard_state(state: T, mesh: Mesh, rules: Rules | None = None) -> T:
    """The state of a training on a mesh, each array of a method's over the axes that its weight lies over.

    Args:
        state: of `Training.start`.
        mesh: one of `make_mesh`.
        rules: as of `shard`.

    Raises:
        PeftError: as `shardings`.
    """
    places = state_shardings(state, mesh, rules)
    placed = jax.tree.map(put, replace(state, step=None), places)
    return replace(placed, step=state.step)


def state_shardings(state: T, mesh: Mesh, rules: Rules | None = None) -> T:
    """Where each array of a training's state lies, None of what is no array; `state` may be of shapes."""
    frozen = state.frozen
    shapes = {
        path: leaf.shape
        for path, leaf in tree.named_leaves(frozen.params).items()
        if not isinstance(leaf, tree.Hole)
    }

    for keys, leaf in jax.tree_util.tree_leaves_with_path((state.trainable, frozen.state)):
        path, slot = _names(keys, shapes)
        if path is not None and slot in (path, "value"):  # a weight that lies whole beside the others
            shapes.setdefault(path, leaf.shape)

    def beside(arrays: Any) -> Any:
        """Of arrays that lie below the path of their parameter."""

        def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path, slot = _names(keys, shapes)
            spec = slot_spec(path, slot, leaf.shape) if path in shapes else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(place, arrays)

    def slot_spec(path: str, slot: str, shape: tuple[int, ...]) -> PartitionSpec:
        of_weight = shapes[path]
        spec = spec_of(path, of_weight, mesh, rules)
        if shape == of_weight or len(of_weight) < 2 or not shape:
            return spec if shape == of_weight else PartitionSpec()
        # Of each expert, or layer, what its matrix has.
        stacked = [own == whole for own, whole in zip(shape, of_weight[:-2])]
        stack = tuple(spec)[: stacked.index(False) if False in stacked else len(stacked)]
        if len(stack) == len(shape):
            return PartitionSpec(*stack)
        # A method's arrays are canonical: the last axis runs over the inputs, the outputs, or neither.
        sides = {"outputs": tuple(spec)[-1], "inputs": tuple(spec)[-2]}
        inputs, outputs = of_weight[-2:]
        if shape[-1] == outputs and (slot != "a" or inputs != outputs):
            side = "outputs"
        elif shape[-1] == inputs:
            side = "inputs"
        else:
            return PartitionSpec(*stack)
        own = names_of(sides.pop(side))
        (others,) = map(names_of, sides.values())
        # Over the axes of the batch's rows too where the weight's other side is, as an array is gathered over
        # these where it is used; over `tensor` it would divide activations.
        rows = tuple(name for name in others if name in ROWS)
        first = names_of(fitting(shape[-1], own, mesh))
        parts = math.prod(mesh.shape[name] for name in first)
        last = (*first, *names_of(fitting(shape[-1] // parts, rows, mesh)))
        middle = (None,) * (len(shape) - 1 - len(stack))
        return PartitionSpec(*stack, *middle, last if len(last) > 1 else next(iter(last), None))

    trainable = beside(state.trainable)
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state.trainable,
        trainable,
    )
    opt_state = shardings_like(jax.eval_shape(lambda: state.opt_state), like)
    whole = NamedSharding(mesh, PartitionSpec())
    if opt_state is None:  # nothing is trained
        opt_state = jax.tree.map(lambda leaf: whole, state.opt_state)
    params = shardings(frozen.params, mesh, rules)
    return replace(
        state,
        step=None,
        frozen=replace(frozen, params=params, state=beside(frozen.state)),
        trainable=trainable,
        opt_state=opt_state,
        key=whole,
    )


def _names(keys: tuple[Any, ...], known: Mapping[str, Any]) -> tuple[str | None, str]:
    """The parameter that an array of a method belongs to, by the names above it, and its own name."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in keys]
    return next((name for name in names if name in known or "/" in name), None), names[-1]
