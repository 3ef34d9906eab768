"""What the tests of methods beside a frozen backbone share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, noisy
from tiny_decoder import PROMPTS, make_decoder, padded, without_cache

import peftjax as pj
from peftjax.models.vit import ViTConfig, vit
from peftjax.train.step import model_loss

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 40, "labels": ("a", "b", "c")}
TOKENS = 17


@functools.cache
def images(layers=3, **changes):
    """A tiny ViT with a classifier, parameters and two images."""
    config = ViTConfig(image_size=(8, 8), patch_size=(2, 2), num_hidden_layers=layers, **SIZES)
    model = vit(config, head="classifier", **changes)
    return model, noisy(jax.jit(model.init)(KEY)), {"pixel_values": jax.random.normal(KEY, (2, 3, 8, 8))}


def made(method, params):
    """`(frozen, trainable)`, as after some steps."""
    frozen, trainable = method.init(KEY, params)
    return frozen, noisy(trainable)


def loss_of(method, model, frozen, batch):
    """A loss of the trainable."""
    run = pj.adapt(method.model(model))
    return lambda trainable: jnp.sum(jnp.sin(3.0 * run(method.apply(frozen, trainable), batch)))


def kept(method, model, params, batch):
    """Shapes of what backward keeps beside parameters and what it is given."""
    frozen, trainable = method.init(KEY, params)

    def residuals(trainable, frozen, batch):
        run = lambda trainable: method.model(model)(method.apply(frozen, trainable), batch)
        return jax.tree.leaves(jax.vjp(run, trainable)[1])

    jaxpr = jax.make_jaxpr(residuals)(trainable, frozen, batch).jaxpr
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    weights |= {leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"])}
    variables = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - {*jaxpr.invars, *jaxpr.constvars}
    return sorted(v.aval.shape for v in variables if v.aval.shape not in weights)


def products(jaxpr):
    """The shapes of the operands and of the result of every product of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def products_of_gradient(method, model, params, batch):
    """As `products`, of the gradient of the trainable."""
    frozen, trainable = made(method, params)
    closed = jax.make_jaxpr(jax.grad(loss_of(method, model, frozen, batch)))(trainable)
    return list(products(closed.jaxpr))


def assert_trains_sharded(method):
    """A step on eight devices is the step on one, and says so of every trained parameter."""
    model, params, batch = images()
    batch = {"pixel_values": jnp.concatenate([batch["pixel_values"]] * 4), "labels": jnp.arange(8) % 3}
    batch["weights"] = jnp.ones(8)
    given = made(method, params)
    loss = model_loss(method.model(model), pj.losses.classification)
    training = pj.training(method, loss, optax.sgd(0.1), grad_norm=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one, metrics = training.step(training.begin(*given, KEY), batch)
    there = jax.device_put(given, NamedSharding(mesh, P()))
    many, _ = training.step(
        training.begin(*there, KEY), jax.device_put(batch, NamedSharding(mesh, P("data")))
    )
    assert_close(many.trainable, one.trainable)
    assert float(metrics["grad_norm"]) > 0


def assert_generates_as_without_a_cache(method):
    """Greedy tokens with the cache are those of whole forward passes, and not those of the base."""
    model, params = make_decoder()
    frozen, trainable = made(method, params)
    adapted, applied = method.model(model), method.apply(frozen, trainable)
    wanted, lead = without_cache(adapted, applied, PROMPTS, 6)
    assert lead > 1e-3  # rounding cannot decide
    for side in ("left", "right"):
        tokens = pj.generate(adapted, applied, padded(PROMPTS, side), max_new_tokens=6).tokens
        np.testing.assert_array_equal(tokens, wanted)
    assert (pj.generate(model, params, padded(PROMPTS), max_new_tokens=6).tokens != wanted).any()
