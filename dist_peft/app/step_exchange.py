"""The work of each step of a training loop, and who computes it.

``Trainer.iterate_steps`` is a generator: it yields the micro-batches of a step, is sent the loss
once their gradients are there, and continues with the update, metrics and checkpoints; and it
yields its evaluations. Alone it is driven by ``run_alone``; several loops are driven together by
``app.sweep``, which computes the work of all of them in one pass over the base.
"""

import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.data.loader import Batch
from dist_peft.train.evaluate import EvalResult, evaluate_model

__all__ = [
    "ComputedGradients",
    "HeldOutPass",
    "StepBatches",
    "StepGenerator",
    "StepWork",
    "compute_alone",
    "compute_gradients_alone",
    "run_alone",
]

Result = TypeVar("Result")


class StepBatches(NamedTuple):
    """The work of a step: this rank's micro-batches, and the targets of the step over all ranks."""

    batches: Sequence[Batch]
    targets: int


class ComputedGradients(NamedTuple):
    """The gradients of a step are in the parameters.

    Attributes:
        loss: mean over the targets in nats.
        seconds: that forward and backward took.
        bytes_gathered: by the engine meanwhile.
    """

    loss: float
    seconds: float
    bytes_gathered: int


class HeldOutPass(NamedTuple):
    """The adapter is to be evaluated on its held-out data, after ``step`` steps. The loop is sent
    the ``EvalResult``, or thrown a ``StopRequested``."""

    step: int


StepWork = StepBatches | HeldOutPass
StepGenerator = Generator[StepWork, Any, int]
"""Yields the work of each step, returns the number of completed steps."""


def run_alone(steps: Generator[StepWork, Any, Result], training: AdapterTraining) -> Result:
    """Compute the work that ``steps`` yields, and return its result."""
    try:
        work = next(steps)
        while True:
            try:
                found = compute_alone(work, training)
            except BaseException as error:
                work = steps.throw(error)  # an error that the loop does not handle comes back
            else:
                work = steps.send(found)
    except StopIteration as end:
        result: Result = end.value
        return result


def compute_alone(work: StepWork, training: AdapterTraining) -> ComputedGradients | EvalResult:
    """Compute one adapter's work by passes of its own.

    Raises:
        StopRequested: on every rank: a signal has come in an evaluation.
    """
    if isinstance(work, StepBatches):
        return compute_gradients_alone(work, training)
    built, loaders = training.built, training.loaders
    assert loaders.eval is not None, "no evaluation without held-out data"
    return evaluate_model(
        built.model, built.engine, loaders.objective, loaders.eval, training.world
    )


def compute_gradients_alone(work: StepBatches, training: AdapterTraining) -> ComputedGradients:
    """Compute the gradients of a step of one adapter by passes of its own."""
    engine = training.built.engine
    begin, before = time.perf_counter(), engine.bytes_gathered
    loss = training.forward_backward(*work)
    return ComputedGradients(loss, time.perf_counter() - begin, engine.bytes_gathered - before)
