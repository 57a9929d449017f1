"""Steps whose loss or gradient is not finite: find the sequences, write them down, decide.

The decision needs no collective of its own. The loss is summed over the ranks anyway, and so is the
norm of the gradient; a loss that is not finite makes the gradient of its micro-batch NaN
(``train.loop``), so that the norm is not finite on every rank and no engine updates anything.

Only after such a step ranks exchange a few integers, and ranks with an offending micro-batch write
its sequences to ``nonfinite/step-000012.rank-1.json`` of the run directory.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, SequenceDataset
from dist_peft.store.writer import write_atomically

__all__ = ["FailedStep", "NonFiniteSteps", "SequenceDescriber"]

log = logging.getLogger("dist_peft")

MOST_SEQUENCES = 64
"""Written for one step and rank."""

LONGEST_TEXT = 8000
"""Characters of a sequence's text."""

MOST_RECORDS = 64
"""Records that are named for a packed sequence."""


@dataclass(frozen=True)
class FailedStep:
    """The facts of this rank about a step whose loss or gradient is not finite.

    Attributes:
        step: its number, from 1.
        loss: mean loss of the step, the same on every rank.
        grad_norm: norm of the gradient, the same on every rank.
        lr: learning rate that the update would have had.
        batches: this rank's micro-batches.
        losses: their losses in nats, in the same order.
        bad_gradients: whether the gradient was seen to be not finite, by micro-batch; empty where
            nothing looked (``train.gradient_watch``).
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    batches: Sequence[Batch]
    losses: Sequence[float]
    bad_gradients: Sequence[bool] = ()

    def list_offending(self) -> list[int]:
        """Return the numbers of this rank's micro-batches whose loss or gradient is not finite."""
        bad = self.bad_gradients or [False] * len(self.batches)
        return [
            number
            for number, (loss, is_bad) in enumerate(zip(self.losses, bad, strict=True))
            if is_bad or not math.isfinite(loss)
        ]


@dataclass(frozen=True)
class SequenceDescriber:
    """Names the records of a sequence and decodes its text.

    Attributes:
        rows: of ``data.train``.
        decode: token ids -> text.
    """

    rows: SequenceDataset
    decode: Callable[[list[int]], str]

    def name_sequence(self, index: int) -> str:
        """Return ``sample 12 (data.train[0]: a.jsonl, record 7)``."""
        records = self.rows.list_records(index)
        if not records:
            return f"sample {index}"
        source, place = records[0]
        more = f" and {len(records) - 1} more" if len(records) > 1 else ""
        return f"sample {index} (data.train[{source}]: {place}{more})"

    def describe_sequence(self, index: int) -> dict[str, Any]:
        """Return number, records and text of a sequence as plain JSON."""
        text = self.decode(self.rows.get_sequence(index)[0].tolist())
        records = self.rows.list_records(index)
        return {
            "sample": index,
            "records": [
                {"source": f"data.train[{source}]", "file": place.file, "record": place.number}
                for source, place in records[:MOST_RECORDS]
            ],
            "num_records": len(records),
            "text": text[:LONGEST_TEXT],
            "num_characters": len(text),
        }


@dataclass
class NonFiniteSteps:
    """The steps of a run without an update because a number was not finite.

    Attributes:
        policy: ``train.on_nonfinite``.
        limit: ``train.max_nonfinite``, over the whole run.
        steps: their numbers, from 1; kept in checkpoints.
        num_halvings: how often the learning rate was halved; kept in checkpoints.
    """

    policy: str
    limit: int
    steps: list[int] = field(default_factory=list)
    num_halvings: int = 0

    @classmethod
    def from_config(cls, config: TrainConfig) -> "NonFiniteSteps":
        return cls(config.on_nonfinite, config.max_nonfinite)

    @property
    def lr_factor(self) -> float:
        return 0.5**self.num_halvings

    def handle_step(
        self, failed: FailedStep, world: World, run_dir: Path, describer: SequenceDescriber
    ) -> None:
        """Write down a failed step and count it, or end the run. Collective.

        Raises:
            RunFailure: on every rank: the policy is ``stop``, or the limit is exceeded. The step is
                not counted then: a resume does it again.
        """
        found = _exchange_offenders(failed, world)
        offending = failed.list_offending()
        if not found:  # the gradient of a parameter overflowed: any may be to blame
            offending = list(range(len(failed.batches)))
        _write_sequences(failed, offending, world, run_dir, describer)
        cause = _describe_cause(failed, found, world, describer)
        texts = run_dir / "nonfinite"
        if self.policy == "stop":
            raise RunFailure(
                f"{cause}; no update was made, and the texts are in {texts}. Lower train.lr, raise "
                "train.warmup, use base.compute_dtype bfloat16 or float32 instead of float16, "
                "remove the records, or skip such steps with train.on_nonfinite: skip "
                "(or halve)"
            )
        if len(self.steps) >= self.limit:
            raise RunFailure(
                f"{cause}; steps before that were not finite: {len(self.steps)}, which is "
                f"train.max_nonfinite. The texts are in {texts}. Lower train.lr, or raise the "
                "limit"
            )
        self.steps.append(failed.step)
        done = "the step is skipped"
        if self.policy == "halve":
            self.num_halvings += 1
            done += f", the learning rate is halved (now 1/{2**self.num_halvings} of train.lr's)"
        log.warning(
            "%s; %s (%d of at most %d, train.on_nonfinite: %s); texts in %s",
            cause,
            done,
            len(self.steps),
            self.limit,
            self.policy,
            texts,
            extra=ONCE,
        )


def _exchange_offenders(failed: FailedStep, world: World) -> list[tuple[int, list[int]]]:
    """Return the ranks with offending micro-batches, each with its first few samples."""
    most = 4
    samples = _list_samples(failed)[:most]
    numbers = [len(samples), *samples, *[-1] * (most - len(samples))]
    gathered = world.gather_integers(numbers)
    return [(rank, row[1 : 1 + row[0]]) for rank, row in enumerate(gathered) if row[0]]


def _list_samples(failed: FailedStep) -> list[int]:
    samples = [n for i in failed.list_offending() for n in failed.batches[i].sample_ids.tolist()]
    return [number for number in samples if number >= 0]


def _describe_cause(
    failed: FailedStep,
    found: Sequence[tuple[int, list[int]]],
    world: World,
    describer: SequenceDescriber,
) -> str:
    what = f"loss {failed.loss:g}, gradient norm {failed.grad_norm:g}"
    text = f"step {failed.step}: {what}: not finite"
    for rank, samples in found[:2]:
        names = ", ".join(map(describer.name_sequence, samples[:2]))
        where = f" on rank {rank}" if world.data_size > 1 else ""
        text += f";{where} in a micro-batch with {names}"
    if len(found) > 2:
        text += f"; and on {len(found) - 2} more ranks"
    if not found:
        text += ", and no micro-batch alone shows it (a gradient of weights overflowed)"
    return text


def _write_sequences(
    failed: FailedStep,
    offending: Sequence[int],
    world: World,
    run_dir: Path,
    describer: SequenceDescriber,
) -> None:
    """Write this rank's ``offending`` micro-batches; if that fails, the step is still decided."""
    if not offending:
        return
    left = MOST_SEQUENCES
    parts = []
    for number in offending:
        samples = [n for n in failed.batches[number].sample_ids.tolist() if n >= 0]
        loss = failed.losses[number]
        parts.append(
            {
                "micro_batch": number,
                "loss": loss if math.isfinite(loss) else repr(loss),
                "num_samples": len(samples),
                "samples": [describer.describe_sequence(n) for n in samples[:left]],
            }
        )
        left -= min(left, len(samples))
    tree = {
        "step": failed.step,
        "rank": world.data_rank,
        "host": world.host,
        "loss": repr(failed.loss),
        "grad_norm": repr(failed.grad_norm),
        "lr": failed.lr,
        "micro_batches": parts,
    }
    file = run_dir / "nonfinite" / f"step-{failed.step:06d}.rank-{world.data_rank}.json"
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(file, json.dumps(tree, indent=1, ensure_ascii=False) + "\n", private=True)
    except (OSError, UserError) as error:
        log.warning("the sequences of step %d cannot be written: %s", failed.step, error)
