"""The work of each step of a training loop, and who computes it.

``Trainer.iterate_steps`` is a generator: it yields the micro-batches of a step, is sent the loss
once their gradients are there, and continues with the update, metrics and checkpoints. Alone it is
driven by ``run_alone``; several loops are driven together by ``app.sweep``, which computes the
gradients of all of them in one pass over the base.
"""

import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.data.loader import Batch

__all__ = ["ComputedGradients", "StepBatches", "StepGenerator", "compute_alone", "run_alone"]


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


StepGenerator = Generator[StepBatches, ComputedGradients, int]
"""Yields the work of each step, returns the number of completed steps."""


def run_alone(steps: StepGenerator, training: AdapterTraining) -> int:
    """Compute each step that ``steps`` yields; return the number of completed steps."""
    try:
        work = next(steps)
        while True:
            try:
                found = compute_alone(work, training)
            except BaseException as error:
                steps.throw(error)  # through the loop's own cleanup
                raise
            work = steps.send(found)
    except StopIteration as end:
        done: int = end.value
        return done


def compute_alone(work: StepBatches, training: AdapterTraining) -> ComputedGradients:
    """Compute the gradients of a step of one adapter by passes of its own."""
    engine = training.built.engine
    begin, before = time.perf_counter(), engine.bytes_gathered
    loss = training.forward_backward(*work)
    return ComputedGradients(loss, time.perf_counter() - begin, engine.bytes_gathered - before)
