"""Curves of a run as pictures (``train.svg``), drawn from the records of ``metrics.jsonl``.

Only numbers of every step are drawn as curves. Evaluations are points: between two of them nothing
is known. Curves that share axes differ in width or marker, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_peft.train.plot_axes import (
    FONT_SIZE,
    SMALL_SIZE,
    add_legend,
    make_axes,
    make_step_axes,
)
from dist_peft.train.step_metrics import StepMetrics
from dist_peft.train.svg import CURVES, INK, drawing, make_figure, render_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PLOTS",
    "PlotSpec",
    "draw_bars",
    "draw_heat_maps",
    "draw_overlay",
    "draw_plot",
    "list_eval_points",
    "list_nonfinite_steps",
    "smooth_values",
]

Records = Sequence[StepMetrics]

_MAIN, _ACCENT, _SECOND = CURVES[:3]
_MARKERS = "DosvP^"


@dataclass(frozen=True)
class PlotSpec:
    """A kind of plot.

    Attributes:
        name: short identifier.
        title: heading.
        unit: label of the vertical axis.
        paint: draws the records on axes.
        is_wide: takes the width of a page, where the page has it.
        is_shown: whether these records have the numbers of the plot.
    """

    name: str
    title: str
    unit: str
    paint: Callable[[Axes, Records], None]
    is_wide: bool = False
    is_shown: Callable[[Records], bool] = bool


def draw_plot(
    plot: PlotSpec, records: Records, *, is_wide: bool = False, is_file: bool = False
) -> str:
    """Return ``plot`` as SVG; ``records`` (at least one) sorted by step.

    Args:
        is_file: for a file of its own.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError(f"nothing to draw in plot {plot.name}: no records")
    with drawing():
        figure, axes = make_step_axes(plot.title, plot.unit, is_wide)
        plot.paint(axes, records)
        text, name = f"{plot.title}: {plot.unit}", _name_drawing(plot.name, is_wide)
        return render_svg(figure, text, name, is_file=is_file)


def draw_overlay(
    runs: Mapping[str, Records], *, is_wide: bool = False, is_file: bool = False
) -> str:
    """Return the losses of several runs over each other as SVG.

    A curve is the moving average of the training loss; the points of its colour are held-out
    losses.

    Args:
        runs: records by the run's name, at least one run with records.
        is_file: for a file of its own.
    """
    title, unit = "Loss: training (curves) and held out (points)", "nats per target token"
    with drawing():
        figure, axes = make_step_axes(title, unit, is_wide)
        for number, (name, records) in enumerate(runs.items()):
            colour, round_ = CURVES[number % len(CURVES)], number // len(CURVES)
            style, marker = ("-", "--", ":", "-.")[round_ % 4], _MARKERS[number % len(_MARKERS)]
            losses = smooth_values([r.loss for r in records], _choose_span(records))
            steps = [r.step for r in records]
            axes.plot(steps, losses, color=colour, ls=style, lw=1.8, label=_format_label(name))
            points = list_eval_points(records)
            axes.plot(*_split(points), color=colour, ls="", marker=marker, ms=5)
        add_legend(axes)
        return render_svg(figure, title, _name_drawing("overlay", is_wide), is_file=is_file)


def draw_bars(title: str, unit: str, values: Mapping[str, float], name: str) -> str:
    """Return bars of ``values`` by label as SVG, in their order.

    Args:
        unit: label of the vertical axis.
        name: short identifier.
    """
    with drawing():
        figure, axes = make_axes(title, unit, SMALL_SIZE)
        axes.bar(range(len(values)), list(values.values()), color=_SECOND, width=0.8)
        shown = range(0, len(values), max(1, -(-len(values) // 12)))
        labels = list(values)
        axes.set_xticks(list(shown), [labels[place] for place in shown])
        axes.set_xlabel("block", color=INK, fontsize=FONT_SIZE)
        return render_svg(figure, f"{title}: {unit}", name)


def draw_heat_maps(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Mapping[str, Sequence[Sequence[float]]],
) -> str:
    """Return tables of shares side by side as SVG.

    Args:
        title: heading of the picture.
        rows, columns: names along a table's sides.
        panels: heading of each table -> ``[rows][columns]`` of numbers from 0 to 1.
    """
    width, height = 1.6 + (0.5 + 0.75 * len(columns)) * len(panels), 1.4 + 0.26 * len(rows)
    with drawing():
        figure = make_figure((max(width, 4.8), max(height, 2.4)), constrained=True)
        figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=11, fontweight="bold")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (heading, table) in zip(all_axes, panels.items(), strict=True):
            image = axes.pcolormesh(table, cmap="cividis", vmin=0, vmax=1)
            axes.set_title(heading, color=INK, fontsize=9)
            axes.set_xticks(
                [x + 0.5 for x in range(len(columns))], columns, rotation=45, ha="right"
            )
            axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
            axes.set_ylim(len(rows), 0)
            axes.tick_params(colors=INK, labelsize=8, length=0)
            axes.spines[:].set_visible(False)
            for y, numbers in enumerate(table):
                for x, share in enumerate(numbers):
                    ink, text = "#000000" if share > 0.5 else "#ffffff", f"{share:.2f}"
                    place = (x + 0.5, y + 0.5)
                    axes.text(*place, text, ha="center", va="center", color=ink, fontsize=7)
        bar = figure.colorbar(image, ax=list(all_axes))
        bar.ax.tick_params(colors=INK, labelsize=8, length=0)
        bar.outline.set_visible(False)
        return render_svg(figure, title, "attention")


def smooth_values(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about ``span`` values, without start bias.

    ``y_t = sum_i a^(t-i) x_i / sum_i a^(t-i)`` with ``a = 1 - 2 / (span + 1)``, ``span >= 1``.
    Values that are not finite are left out; the average stays where it was.
    """
    keep = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def list_eval_points(records: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """Return (steps done, held-out loss) of every evaluation, the one before training included."""
    points = []
    for record in records:
        if record.eval_loss_before is not None:
            points.append((record.step - 1, record.eval_loss_before))
        if record.eval_loss is not None:
            points.append((record.step, record.eval_loss))
    return points


def _name_drawing(name: str, is_wide: bool) -> str:
    return f"{name}-wide" if is_wide else name


def _format_label(name: str) -> str:
    """A legend leaves out labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _split(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _draw_curve(axes: Axes, records: Records, values: Sequence[float], label: str = "") -> None:
    """Draw one curve over zero, with headroom.

    The few points of a short run get markers; a single one would be invisible.
    """
    marker = "o" if len(records) <= 20 else None
    colour = _ACCENT if label == "reserved" else _SECOND
    steps = [r.step for r in records]
    axes.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=4, label=label)
    finite = [value for value in values if math.isfinite(value)]
    axes.set_ylim(0, 1.1 * max(finite, default=0) or 1)


def _choose_span(records: Records) -> float:
    """Return the span of a moving average over a curve; short ones are not smoothed."""
    return 1.0 if len(records) < 10 else max(5.0, len(records) / 20)


def _paint_loss(axes: Axes, records: Records) -> None:
    steps, losses = [r.step for r in records], [r.loss for r in records]
    if len(records) < 10:
        axes.plot(steps, losses, color=_MAIN, lw=1.6, marker="o", ms=4, label="train")
    else:
        average = smooth_values(losses, _choose_span(records))
        axes.plot(steps, losses, color=_MAIN, lw=0.8, alpha=0.35, label="train, each step")
        axes.plot(steps, average, color=_MAIN, lw=2, label="train, moving average")
    if points := list_eval_points(records):
        axes.plot(*_split(points), color=_ACCENT, ls="", marker="D", ms=5, label="held out")
    _mark_steps(axes, records)
    add_legend(axes)


def _mark_steps(axes: Axes, records: Records) -> None:
    """Mark spikes of the loss, and at the upper edge the steps without an update."""
    style: dict[str, Any] = {"color": _ACCENT, "ls": "", "ms": 7}
    if spikes := [(r.step, r.loss) for r in records if r.spike is not None]:
        axes.plot(*_split(spikes), marker="^", label="spike", **style)
    if failed := list_nonfinite_steps(records):
        edge, text = axes.get_xaxis_transform(), "not finite, no update"
        axes.plot(failed, [0.97] * len(failed), marker="x", transform=edge, label=text, **style)


def list_nonfinite_steps(records: Sequence[StepMetrics]) -> list[int]:
    """Return the steps that made no update because the loss or the gradient was not finite."""
    return [r.step for r in records if not math.isfinite(r.grad_norm)]


def _list_tasks(records: Records) -> list[str]:
    """Return the held-out sources that have losses of their own."""
    tables = (r.eval_by_task_before or r.eval_by_task or {} for r in records)
    return list(dict.fromkeys(name for table in tables for name in table))


def _paint_tasks(axes: Axes, records: Records) -> None:
    for number, task in enumerate(_list_tasks(records)):
        points = []
        for record in records:
            for table, step in (
                (record.eval_by_task_before, record.step - 1),
                (record.eval_by_task, record.step),
            ):
                if table is not None and task in table:
                    points.append((step, table[task]))
        colour, marker = CURVES[number % len(CURVES)], _MARKERS[number % len(_MARKERS)]
        label = _format_label(task)
        axes.plot(*_split(points), color=colour, ls="", marker=marker, ms=5, label=label)
    add_legend(axes)


def _paint_lr(axes: Axes, records: Records) -> None:
    _draw_curve(axes, records, [r.lr for r in records])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))  # 1e-4, as it is configured
    axes.yaxis.set_offset_position("right")  # the title is on the left


def _paint_grad_norm(axes: Axes, records: Records) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    norms = [r.grad_norm for r in records]
    _draw_curve(axes, records, norms)
    norms = [norm for norm in norms if math.isfinite(norm)] or [0.0]
    if min(norms) > 0 and max(norms) > 10 * statistics.median(norms):
        axes.set_yscale("log")  # one outburst would flatten everything else
        axes.set_ylim(min(norms) / 1.3, max(norms) * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _paint_speed(axes: Axes, records: Records) -> None:
    from matplotlib.ticker import EngFormatter

    _draw_curve(axes, records, [r.tokens_per_s for r in records])
    axes.yaxis.set_major_formatter(EngFormatter())


def _paint_memory(axes: Axes, records: Records) -> None:
    _draw_curve(axes, records, [r.mem_peak / 2**30 for r in records], "allocated")
    reserved = [r.mem_reserved for r in records if r.mem_reserved is not None]
    if len(reserved) == len(records):
        _draw_curve(axes, records, [count / 2**30 for count in reserved], "reserved")
        add_legend(axes)


def _paint_wait(axes: Axes, records: Records) -> None:
    _draw_curve(axes, records, [_or_nan(r.straggler_share) for r in records])
    axes.yaxis.set_major_formatter("{x:.0%}")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _has_straggler_share(records: Records) -> bool:
    return any(r.straggler_share is not None for r in records)


PLOTS: tuple[PlotSpec, ...] = (
    PlotSpec("loss", "Loss", "nats per target token", _paint_loss, is_wide=True),
    PlotSpec(
        *("tasks", "Held-out loss by task", "nats per target token", _paint_tasks),
        is_shown=lambda records: bool(_list_tasks(records)),
    ),
    PlotSpec("lr", "Learning rate", "learning rate", _paint_lr),
    PlotSpec("grad_norm", "Gradient norm", "L2 norm before clipping", _paint_grad_norm),
    PlotSpec("tokens_per_s", "Throughput", "targets / s", _paint_speed),
    PlotSpec("memory", "Peak memory so far", "GiB, fullest rank", _paint_memory),
    PlotSpec(
        *("stragglers", "Straggler share", "of the slowest rank's work", _paint_wait),
        is_shown=_has_straggler_share,
    ),
)
"""The plots of a report, in its order."""
