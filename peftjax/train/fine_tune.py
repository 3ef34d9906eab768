"""The second step of a run: the model's weights, the method on them, training, and the scores."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from peftjax.backbone.backbone import Backbone
from peftjax.core import tree
from peftjax.losses import Batch, classification, mean
from peftjax.models.vocabulary import require_ids
from peftjax.parallel.mesh import find_mesh, require_rows
from peftjax.train.config import TrainConfig
from peftjax.train.evaluate import make_evaluate
from peftjax.train.loop import FitResult, fit
from peftjax.train.new_head import with_new_head
from peftjax.train.open import open_model
from peftjax.train.output_folder import run_identity
from peftjax.train.tasks import TASKS
from peftjax.train.tasks.task import Run
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.inspection import adapted_line
from peftjax.transform.registry import describe
from peftjax.transform.transform import Transform

# Of the first batch, for the method's checks, which may keep what training does not.
CHECKED_ROWS = 2
# Options that change what is written or kept, and not the numbers of the run.
_NOT_IDENTITY = ("log_every", "keep_last", "keep_best", "save_every", "tensorboard", "attention", "mesh")


@dataclass(frozen=True)
class Result:
    """What a run has trained, and how good it is."""

    method: Transform
    """The run's method, with plain training of what the head has new."""
    head: str
    """The model's head."""
    fitted: FitResult
    scores: Mapping[str, float]
    """On the evaluation data, as its task names them."""
    before: Mapping[str, float]
    """The same before training, where the task has them."""
    started: Mapping[str, Any]
    """What the task has to report of how the run started."""
    total_parameters: int


def fine_tune(run: Run, say: Callable[[str], None] = lambda text: None) -> Result:
    """Load the model, train the method on it, or go on where an interrupted run stopped, and evaluate.

    Args:
        run: from `resolve`.
        say: called with a line about each stage.

    Raises:
        PeftError: the mesh does not divide a batch, the weights cannot be read, the method does not fit the
            model, the output folder belongs to another run, or a loss or gradient is not finite.
    """
    config, data, task = run.config, run.data, TASKS[run.task]
    mesh = find_mesh(config.mesh)
    if mesh is not None:
        rows = config.batch_size // config.grad_accumulation
        require_rows("batch_size", rows, mesh, config.max_length or 1)
    model, params = open_model(
        run.base,
        run.options.base,
        data.num_labels,
        dtype=config.dtype,
        remat=config.remat,
        seed=config.seed,
        mesh=mesh,
    )
    model = dataclasses.replace(model, attention=config.attention)
    for tokens in (data.train, data.evaluation):
        name = f"the text by the tokenizer of {run.base.name}"
        require_ids(tokens.ids, model.config.vocab_size, name=name)
    method = with_new_head(run.method, model, params)
    params, started = task.start(run, model, params, method, say)
    frozen, trainable = method.init(jax.random.key(config.seed), params)
    total = tree.count(params)
    say(f"{method.name}: {tree.count(trainable):,} of {total:,} parameters are trained")
    say(adapted_line(method, params, frozen, trainable))
    identity = {
        **run_identity(describe(method), params),
        "data": data.identity,
        "training": _training(config),
        **({"untied": True} if run.options.base.untie else {}),
    }
    # What is trained whole is a copy already: the one that was loaded is not needed any more.
    del params

    forward = method.model(model)
    evaluate = make_evaluate(forward, method, classification, mesh)
    before: dict[str, float] = {}
    if task.evaluates_before:
        before = task.named_scores(evaluate(trainable, frozen, data.held_out()))
        say(f"before training: {', '.join(f'{score} {value:.4f}' for score, value in before.items())}")
    warn(method, model, frozen, trainable, data.training)
    fitted = fit(
        forward,
        method,
        frozen,
        trainable,
        data.training,
        data.held_out,
        config=config,
        steps=run.steps,
        key=jax.random.key(config.seed),
        directory=run.options.output,
        identity=identity,
        evaluate=evaluate,
        mesh=mesh,
    )
    scores = task.named_scores(evaluate(fitted.trainable, fitted.frozen, data.held_out()))
    return Result(method, model.head_name, fitted, scores, before, started, total)


def warn(method: Transform, model: Backbone, frozen: Frozen, trainable: Trainable, batches: Any) -> None:
    """Warn of what the method's own checks find on the first rows of the next training batch."""
    if not method.checks:
        return
    state = batches.get_state()
    rows = {name: values[:CHECKED_ROWS] for name, values in next(batches).items()}
    batches.set_state(state)

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        sums, weight = classification(outputs, batch)
        return mean(sums["loss"], weight)

    for check in method.checks:
        found = check(method, model, frozen, trainable, rows, loss)
        if found is not None:
            warnings.warn(found, stacklevel=2)


def _training(config: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's numbers beside method, model and data."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
