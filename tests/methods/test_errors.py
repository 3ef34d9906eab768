"""Every way to misuse a method is one sentence that names the thing; those of adapters put together, of
merging and of unknown options are tested beside what they guard."""

import re

import jax.numpy as jnp
import pytest
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError

PARAMS = {
    "layers": [{"query": {"kernel": jnp.zeros((8, 6))}, "norm": {"scale": jnp.ones(8)}} for _ in range(2)],
    "blocks": {"up": {"kernel": jnp.zeros((3, 8, 6))}},
    "words": {"embedding": jnp.zeros((5, 8))},
}

WHEN_MADE = [
    (lambda: pj.build({"name": "lroa"}), "no method is called 'lroa'; closest: 'road', 'lora'"),
    (lambda: pj.build({}), "no method is called None"),
    (lambda: pj.build({"name": "chain"}), "chain: give at least one method"),
    (lambda: pj.build({"name": "train"}), "train: the option 'targets' is missing"),
    (lambda: pj.chain(), "chain: give at least one method"),
    (lambda: pj.dora(ranck=4), "dora: unknown option 'ranck'; did you mean 'rank'"),
    (lambda: pj.dora(init="gaussian"), "dora: unknown option 'init'"),
    (lambda: pj.rslora(rslora=False), "rslora: unknown option 'rslora'"),
    (
        lambda: pj.lora(init="gauss"),
        "lora: init must be one of uniform, gaussian, orthogonal, zero_a, got 'gauss'",
    ),
    (lambda: pj.lora(dropout=1.0), "lora: dropout must be in [0, 1), got 1.0"),
    (lambda: pj.lora(dropout=-0.1), "lora: dropout must be in [0, 1), got -0.1"),
    (
        lambda: pj.lora(bias="lora_only"),
        "lora: bias must be one of none, adapted, all, added, got 'lora_only'",
    ),
    (lambda: pj.pissa(rank=0), "pissa: rank must be positive, got 0"),
    (lambda: pj.pissa(iterations=0), "pissa: iterations must be positive, got 0"),
    (lambda: pj.lora_plus(ratio=0.0), "lora_plus: ratio must be positive, got 0.0"),
    (lambda: pj.rows([]), "rows: give distinct, non-negative row numbers, got []"),
    (lambda: pj.rows([1, 1]), "rows: give distinct, non-negative row numbers, got [1, 1]"),
    (lambda: pj.rows([-1]), "rows: give distinct, non-negative row numbers, got [-1]"),
]

IN_INIT = [
    (pj.lora(targets=["qury"]), "lora: target 'qury' matched no parameter; closest: 'layers/1/query'"),
    (pj.lora(targets=["query", "qury"]), "lora: target 'qury' matched no parameter"),
    (pj.lora(targets="query"), "lora: pattern 'query' matched no parameter; closest: 'layers/1/query'"),
    (pj.lora(exclude=["up", "query"]), "lora: exclude ['up', 'query'] removes every parameter"),
    (pj.lora(rank=7), "lora: rank 7 is larger than 'blocks/up/kernel', a matrix of 8 x 6; lower rank"),
    (pj.lora(rank=2, rank_pattern={"up": 0}), "lora: rank must be positive, got 0 for 'blocks/up/kernel'"),
    (pj.lora(rank=2, rank_pattern={"uq": 1}), "lora: pattern 'uq' matched no target; closest: 'blocks/up"),
    (pj.lora(rank=2, alpha_pattern={"down": 1.0}), "lora: pattern 'down' matched no target; closest:"),
    (pj.lora(rank=2, alpha=0.0), "lora: alpha must be positive, got 0.0 for 'blocks/up/kernel'"),
    (pj.pissa(rank=2, alpha_pattern={"up": -1.0}), "pissa: alpha must be positive, got -1.0 for 'blocks/up"),
    (pj.lora(rank=2, layers=3), "lora: no target lies in layer 3; targets: 'blocks/up/kernel'"),
    (pj.lora(rank=2, layers=[0, -1]), "lora: no target lies in layer -1"),
    (pj.lora(rank=2, layers=[]), "lora: layers names no layer; give at least one number"),
    (pj.lora(rank=2, layers=1, layers_pattern="stages", targets=["query"]), "no target lies in layer 1"),
    (
        pj.lora(rank=3, init="orthogonal"),
        "init 'orthogonal' needs an even rank, got 3 for 'blocks/up/kernel'",
    ),
    (pj.lora(rank=2, bias="all"), "lora: bias='all' was asked for but the model has no such bias"),
    (pj.lora(rank=2, layouts={"up": "io"}), "blocks/up/kernel: layout 'io' does not fit shape (3, 8, 6)"),
    (pj.lora(rank=2, layouts={"up": "sii"}), "layout 'sii' needs an input axis and an output axis"),
    (
        pj.pissa(rank=2, layers=1, targets=["up"]),
        "pissa: 'blocks/up/kernel' is stacked; this start takes all",
    ),
    (pj.rows([5]), "rows: 'words/embedding' has 5 rows, row 5 is not among them"),
    (pj.rows([1], targets=["up"]), "rows: 'blocks/up/kernel' has axes 'sio'; a matrix is needed"),
    (pj.rows([1], targets=["wrods"]), "rows: target 'wrods' matched no parameter; closest: 'words"),
    (pj.unfreeze(["nrom"]), "unfreeze: target 'nrom' matched no parameter; closest: 'layers/1/norm"),
    (pj.bitfit(), "bitfit: target 'bias' matched no parameter"),
    (pj.freeze(".*"), "freeze: exclude '.*' removes every parameter"),
    (
        pj.freeze(["scales"]),
        "freeze: exclude ['scales'] matched none of the targets; closest: 'layers/1/norm",
    ),
]


@pytest.mark.parametrize(("make", "text"), WHEN_MADE, ids=lambda value: value if type(value) is str else "")
def test_a_wrong_option_is_refused_when_the_method_is_made(make, text):
    with pytest.raises(PeftError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("method", "text"), IN_INIT, ids=lambda value: value if type(value) is str else value.name
)
def test_what_does_not_fit_the_parameters_is_refused_by_init(method, text):
    with pytest.raises(PeftError, match=re.escape(text)):
        method.init(KEY, PARAMS)


QUERY = {"rank": 2, "targets": ["query"]}
CHAINS = [
    (
        (pj.unfreeze(["query"]), pj.lora(**QUERY)),
        "chain: 'lora' adapts 'layers/0/query/kernel', which 'unfreeze'",
    ),
    (
        (pj.unfreeze(["norm"]), pj.unfreeze(["scale"])),
        "chain: 'unfreeze_2' adapts 'layers/0/norm/scale', which 'unfreeze'",
    ),
    ((pj.lora(**QUERY), pj.full()), "full: 'layers/0/query/kernel' is already a LowRank; exclude it here"),
    ((pj.lora(**QUERY), pj.pissa(**QUERY)), "pissa: 'layers/0/query/kernel' is a LowRank; this start needs"),
]


@pytest.mark.parametrize(("methods", "text"), CHAINS, ids=[text for _, text in CHAINS])
def test_two_methods_that_cannot_chain_say_why(methods, text):
    with pytest.raises(PeftError, match=re.escape(text)):
        pj.chain(*methods).init(KEY, PARAMS)
