"""The record of one optimizer step and ``metrics.jsonl``, which holds one in each line.

Keys without a value are left out, a number that is not finite is ``null``::

    {"step": 12, "loss": 1.83, "lr": 0.0002, "grad_norm": 0.41, "tokens": 16210,
     "tokens_per_s": 5403.1, "mem_peak": 8123456789, "bytes_gathered": 123456, ...}
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dist_peft.core.errors import UserError

__all__ = ["METRICS_FILE", "SCORE_TITLES", "StepMetrics", "format_line", "read_metrics"]

METRICS_FILE = "metrics.jsonl"

SCORE_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "matthews": "Matthews correlation",
    "f1": "F1",
}
"""Scores of classes (``train.classification_metrics``): name -> in messages and reports."""

_BY_TASK = tuple(
    f"eval_{score}by_task{when}"
    for score in ("", *(f"{name}_" for name in SCORE_TITLES))
    for when in ("", "_before")
)

_TEXTS = ("sample_texts", "sample_texts_before")


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step.

    Attributes:
        step: steps done, this one included.
        loss: mean over the step's target tokens, in nats.
        lr: learning rate of the update.
        grad_norm: norm of the whole gradient before clipping.
        tokens: target tokens of the step, over all ranks.
        tokens_per_s: ``tokens`` over the step's wall time.
        mem_peak: peak memory so far in bytes, of the rank that uses most.
        mem_reserved: on GPUs, the most that the allocator has held so far, of the rank that holds
            most; ``mem_peak`` is the part that tensors were in.
        straggler_share: of several ranks on CPUs, see ``train.rank_load``.
        rank_rate_min, rank_rate_median, rank_rate_max: of several ranks, the target tokens/s of
            each without its waiting for slower ones (CPUs) or over the wall time (GPUs), see
            ``train.rank_load``.
        slowest_rank: of several ranks on CPUs, the one that worked longest.
        bytes_gathered: bytes of all-gather output one rank received in the step.
        eval_loss: held-out loss after the step, where it was evaluated.
        eval_loss_before: held-out loss before the first step, on the line of that step.
        eval_by_task, eval_by_task_before: the same for each of several held-out sources, by name.
        eval_accuracy, eval_macro_f1, eval_matthews, eval_f1, ...: of classes, see
            ``train.classification_metrics``; as the losses.
        epoch: passes over the training data so far.
        samples: sequences seen so far.
        seconds: wall time of the step.
        nonfinite_steps: steps so far, this one included, without an update because a number was not
            finite; left out where there is none.
        spike: robust z-score of the loss, where it is a spike (``train.spikes``).
        sampling_eps, sampling_replaced: with scheduled sampling, the probability of gold inputs,
            and the share of the completion's inputs that were drawn to be replaced.
        sample_texts: text that the model generates after the last step for ``train.samples``
            prompts: objects of ``prompt``, ``text`` and the ``expected`` text of the data.
        sample_texts_before: the same before the first step, on the line of that step.
        domain_loss, domain_accuracy, reversal_strength: with domain-adversarial training, of the
            step's rows with a domain, and the factor of the reversed gradient. ``loss`` is that of
            classes and domains together.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    mem_peak: int
    bytes_gathered: int
    eval_loss: float | None = None
    eval_loss_before: float | None = None
    eval_by_task: dict[str, float] | None = None
    eval_by_task_before: dict[str, float] | None = None
    eval_accuracy: float | None = None
    eval_accuracy_before: float | None = None
    eval_accuracy_by_task: dict[str, float] | None = None
    eval_accuracy_by_task_before: dict[str, float] | None = None
    eval_macro_f1: float | None = None
    eval_macro_f1_before: float | None = None
    eval_macro_f1_by_task: dict[str, float] | None = None
    eval_macro_f1_by_task_before: dict[str, float] | None = None
    eval_matthews: float | None = None
    eval_matthews_before: float | None = None
    eval_matthews_by_task: dict[str, float] | None = None
    eval_matthews_by_task_before: dict[str, float] | None = None
    eval_f1: float | None = None
    eval_f1_before: float | None = None
    eval_f1_by_task: dict[str, float] | None = None
    eval_f1_by_task_before: dict[str, float] | None = None
    epoch: float | None = None
    samples: int | None = None
    seconds: float | None = None
    nonfinite_steps: int | None = None
    spike: float | None = None
    sampling_eps: float | None = None
    sampling_replaced: float | None = None
    domain_loss: float | None = None
    domain_accuracy: float | None = None
    reversal_strength: float | None = None
    mem_reserved: int | None = None
    straggler_share: float | None = None
    rank_rate_min: float | None = None
    rank_rate_median: float | None = None
    rank_rate_max: float | None = None
    slowest_rank: int | None = None
    sample_texts: list[dict[str, str]] | None = None
    sample_texts_before: list[dict[str, str]] | None = None


def read_metrics(path: Path) -> list[StepMetrics]:
    """The records of a ``metrics.jsonl``, by rising step; no file, no records.

    A torn last line (a run that was killed while writing) is passed over, keys this version does
    not know are ignored, and of a repeated step the last line counts.

    Raises:
        UserError: another line is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: dict[int, StepMetrics] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _parse_line(line)
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a step record ({error}); remove the line"
            ) from None
        records[record.step] = record
    return [records[step] for step in sorted(records)]


def format_line(record: StepMetrics) -> str:
    """Return the record's line of ``metrics.jsonl``, with its newline."""
    values = {key: _to_json_value(v) for key, v in asdict(record).items() if v is not None}
    return json.dumps(values, allow_nan=False) + "\n"


def _to_json_value(value: Any) -> Any:
    """JSON has no NaN: ``None`` stands for what is not finite."""
    if isinstance(value, list):  # of texts
        return value
    if isinstance(value, dict):
        return {key: _to_json_value(number) for key, number in value.items()}
    return value if math.isfinite(value) else None


def _parse_line(line: str) -> StepMetrics:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    known = {field.name for field in fields(StepMetrics)}
    numbers: dict[str, Any] = {}
    for key in known & values.keys():
        value = values[key]
        if key in _TEXTS:
            numbers[key] = _parse_texts(key, value)
        elif key in _BY_TASK and isinstance(value, dict):
            numbers[key] = {
                name: _parse_number(f"{key}.{name}", own) for name, own in value.items()
            }
        else:
            numbers[key] = _parse_number(key, value)
    return StepMetrics(**numbers)


def _parse_texts(key: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and all(isinstance(text, str) for text in item.values())
        for item in value
    ):
        raise ValueError(f"{key} is no list of objects of texts")
    return value


def _parse_number(key: str, value: Any) -> float:
    value = math.nan if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, not a number")
    return value
