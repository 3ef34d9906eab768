"""What `meft_check` reports is what the gradients are, and a run warns of it."""

import dataclasses
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY
from test_meft import BATCH, encoder

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.reversible.check import accepted, candidates, largest_error
from peftjax.train.fine_tune import warn


def loss(outputs, batch):
    return jnp.sum(jnp.sin(outputs) * jnp.cos(jnp.arange(outputs.shape[-1])))


def report(method, layers=4):
    model, params = encoder(layers)
    return pj.meft_check(method, model, *method.init(KEY, params), BATCH, loss=loss)


@pytest.fixture(scope="module")
def failing():
    return report(pj.chain(pj.meft(variant=3, anchor_every=0), pj.unfreeze(["embed/norm/scale"])))


@pytest.mark.slow
def test_a_report_names_the_largest_anchor_distance_that_passes(failing):
    assert not failing.passed
    assert failing.gradient_error > 1e-3
    assert failing.largest_anchor_every == 2
    assert "layer 0" in failing.worst
    errors = failing.reconstruction["blocks"]
    assert len(errors) == 4
    assert errors[0] > 30 * errors[1] > 900 * errors[2]  # by how much differs with the machine


@pytest.mark.slow
def test_a_report_reads_well(failing):
    text = str(failing)
    assert "meft, anchor_every=0: gradients FAIL, relative error" in text
    assert "largest anchor_every that passes: 2" in text
    assert "error of the inputs of blocks" in text


@pytest.mark.slow
def test_what_divides_by_one_needs_no_anchors():
    found = report(pj.meft(lam=1.0, anchor_every=3))
    assert found.passed
    assert found.largest_anchor_every == 0
    errors = found.reconstruction["blocks"]
    assert errors[1] == 0.0 < errors[0] < 1e-4


@pytest.mark.slow
def test_a_shorter_dtype_is_measured_by_its_own_rounding():
    model = encoder(4)[0]
    measured = {1: (0.01, "a"), 2: (0.015, "a"), 4: (0.3, "a")}.get
    assert accepted(measured, model, 1e-3) == 1e-3
    assert accepted(measured, dataclasses.replace(model, dtype="bfloat16"), 1e-3) == 0.02
    assert accepted(measured, dataclasses.replace(model, dtype="bfloat16"), 0.1) == 0.1


def test_candidates_keep_ever_more_pairs():
    assert candidates(12) == [0, 6, 4, 3, 2, 1]
    assert candidates(1) == [0]


def test_an_error_that_is_no_number_is_the_worst():
    exact = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    value, name = largest_error({**exact, "a": exact["a"].at[1, 0].set(jnp.nan)}, exact, {2})
    assert name == "a, layer 1"
    assert math.isnan(value)
    assert largest_error({**exact, "b": 1.5 * exact["b"]}, exact, {2}) == (pytest.approx(0.5), "b")


def test_a_method_without_a_reversible_stack():
    with pytest.raises(PeftError, match="pfeiffer has no reversible stack"):
        report(pj.pfeiffer())


class Batches:
    """Endless batches with a state, as of the loop."""

    def __init__(self):
        self.count = 0

    def get_state(self):
        return self.count

    def set_state(self, state):
        self.count = state

    def __next__(self):
        self.count += 1
        ids = np.asarray(BATCH["input_ids"])
        return {"input_ids": ids, "labels": ids % 5, "weights": np.ones(ids.shape, np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(("every", "warns"), [(0, True), (2, False)])
def test_a_run_warns_before_its_first_step_and_uses_up_no_batch(every, warns):
    model, params = encoder(4)
    method = pj.chain(pj.meft(variant=3, anchor_every=every), pj.bitfit())
    batches = Batches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(method, model, *method.init(KEY, params), batches)
    texts = [str(w.message) for w in caught if "meft:" in str(w.message)]
    assert len(texts) == warns
    assert not warns or "anchor_every=2 keeps it below 1e-03" in texts[0]
    assert batches.count == 0
