"""A small decoder, and steps of it on a mesh."""

import dataclasses

import jax
import optax

import peftjax as pj
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.parallel import make_mesh, shard_batch, shard_state

CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MODEL = decoder(read_config(CONFIG), head="causal_lm")
MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4", "fsdp=4,sequence=2")


def begun(method, mesh=None, *, rows=8, length=16, model=MODEL, **options):
    """The training of a method, its state and a batch; on a mesh where one is given."""
    keys = jax.random.split(jax.random.key(3))
    ids = [jax.random.randint(key, (rows, length), 0, CONFIG["vocab_size"]) for key in keys]
    batch = dict(zip(("input_ids", "labels"), ids))
    forward = pj.adapt(method.model(dataclasses.replace(model, mesh=mesh, **options)))

    def loss(params, batch):
        return pj.losses.cross_entropy(forward(params, batch), batch)

    run = pj.training(method, loss, optax.adamw(1e-2))
    state = run.start(jax.random.key(1), model.init(jax.random.key(0)))
    if mesh is None:
        return run, state, batch
    return run, shard_state(state, mesh), shard_batch(batch, mesh)


def losses(method, sizes=None, devices=None, steps=20, **options):
    """Those of some steps, and the state after them."""
    mesh = None if sizes is None else make_mesh(sizes, devices)
    run, state, batch = begun(method, mesh, **options)
    found = []
    for _ in range(steps):
        state, metrics = run.step(state, batch)
        found.append(float(metrics["loss"]))
    return found, state
