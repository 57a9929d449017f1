"""The result of a sweep: points by held-out loss, their curves and tables."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_peft.app.comparison_page import write_comparison
from dist_peft.app.run_comparison import read_runs
from dist_peft.app.sweep.sweep_file import SweepFile, describe_values
from dist_peft.store.writer import write_atomically
from dist_peft.train.step_metrics import METRICS_FILE

__all__ = ["RankedPoint", "format_ranking", "rank_points", "write_ranking"]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class RankedPoint:
    """A point and its result.

    Attributes:
        held_out_loss: at its last evaluation; None: there are no held-out data.
        held_out_best: the lowest of its evaluations.
        training_loss: moving average at its last step.
    """

    point: str
    values: dict[str, Any]
    state: str
    step: int
    held_out_loss: float | None
    held_out_best: float | None
    training_loss: float


def rank_points(run_dir: Path, records: SweepFile) -> list[RankedPoint]:
    """Return the points with a step done, best first.

    Those that trained to the end come first, by their last held-out loss, or by the training loss
    where there is none; then those that halving stopped, later ones first; failed ones last.
    """
    return sorted(_read_points(run_dir, records), key=_get_rank)


def _read_points(run_dir: Path, records: SweepFile) -> list[RankedPoint]:
    names = [n for n in records.points if (run_dir / n / METRICS_FILE).is_file()]
    if len(names) < 2:
        return []
    ranked = []
    for name, run in zip(names, read_runs([run_dir / name for name in names]), strict=True):
        record, outcome = records.points[name], run.outcome
        losses = (outcome.held_out_loss, outcome.held_out_best, outcome.training_loss)
        ranked.append(RankedPoint(name, record.values, record.state, outcome.steps, *losses))
    return ranked


def _get_rank(point: RankedPoint) -> tuple[int, int, float]:
    order = {"finished": 0, "halved": 1, "failed": 2}.get(point.state, 3)
    loss = point.training_loss if point.held_out_loss is None else point.held_out_loss
    return order, -point.step if point.state == "halved" else 0, loss if loss == loss else math.inf


def format_ranking(ranking: Sequence[RankedPoint]) -> list[str]:
    """Return lines for a terminal, best first."""
    lines = []
    for place, point in enumerate(ranking, 1):
        loss = point.training_loss if point.held_out_loss is None else point.held_out_loss
        kind = "training" if point.held_out_loss is None else "held-out"
        values = describe_values(point.values)
        state = "" if point.state == "finished" else f", {point.state} at step {point.step}"
        lines.append(f"{place}. {point.point}: {kind} loss {loss:.4f} ({values}){state}")
    return lines


def write_ranking(run_dir: Path, records: SweepFile) -> None:
    """Write ``ranking.json`` and ``report.html``, and log the ranking; on the first rank.

    Raises:
        UserError: metrics of a point are damaged.
    """
    ranking = rank_points(run_dir, records)
    if not ranking:
        return
    tree = {"points": [_drop_nonfinite(asdict(point)) for point in ranking]}
    write_atomically(run_dir / "ranking.json", json.dumps(tree, indent=1) + "\n")
    runs = read_runs([run_dir / point.point for point in ranking])
    write_comparison(runs, run_dir / "report.html")
    for line in format_ranking(ranking):
        log.info("%s", line)


def _drop_nonfinite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
