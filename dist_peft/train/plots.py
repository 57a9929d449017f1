"""Curves of a run as PNG images, drawn from the records of ``metrics.jsonl``.

matplotlib's object interface with the Agg canvas: no display, no global state. Every plot exists in
a light and a dark theme. Colours are from Okabe & Ito's palette, which colour-blind readers can
distinguish; curves that share axes also differ in width or marker.

matplotlib is imported by the functions that draw: it takes most of a second, and ranks above 0 draw
nothing.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

from dist_peft.train.step_metrics import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PLOTS",
    "PlotSpec",
    "Theme",
    "draw_heat_maps",
    "draw_plot",
    "draw_plot_in_themes",
    "list_eval_points",
    "list_nonfinite_steps",
    "smooth_values",
]

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class _Palette:
    background: str
    ink: str
    grid: str
    main: str
    accent: str
    second: str


_PALETTES: dict[str, _Palette] = {
    "light": _Palette("#ffffff", "#333a40", "#e3e6e8", "#0072b2", "#d55e00", "#009e73"),
    "dark": _Palette("#1c2024", "#c9d1d6", "#343b41", "#56b4e9", "#e69f00", "#2ec4a0"),
}


_COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
"""Properties of artists that hold a colour of the palette."""


@dataclass(frozen=True)
class PlotSpec:
    """A kind of plot.

    Attributes:
        name: short identifier, also a file name.
        title: heading.
        unit: label of the vertical axis.
        size: width and height in inches.
        paint: draws the records on axes.
    """

    name: str
    title: str
    unit: str
    size: tuple[float, float]
    paint: Callable[[Axes, Sequence[StepMetrics], _Palette], None]


def draw_plot(plot: PlotSpec, records: Sequence[StepMetrics], theme: Theme = "light") -> bytes:
    """Return a PNG of ``plot``; ``records`` (at least one) sorted by step."""
    return _render_png(_paint_figure(plot, records, _PALETTES[theme]))


def draw_plot_in_themes(plot: PlotSpec, records: Sequence[StepMetrics]) -> dict[Theme, bytes]:
    """Return what ``draw_plot`` returns, for both themes.

    The second one is the same figure in other colours: making its ticks and texts takes longer than
    drawing them again.
    """
    figure = _paint_figure(plot, records, _PALETTES["light"])
    light = _render_png(figure)
    _change_palette(figure, _PALETTES["light"], _PALETTES["dark"])
    return {"light": light, "dark": _render_png(figure)}


def _change_palette(figure: Figure, before: _Palette, after: _Palette) -> None:
    from matplotlib.colors import to_rgb

    new = {to_rgb(colour): after_colour for colour, after_colour in _pair_colours(before, after)}
    for artist in figure.findobj():
        changes = {}
        for name in _COLOURS:
            read = getattr(artist, f"get_{name}", None)
            colour = read() if read is not None else None
            # "auto", "none" and the colours of collections stay
            if isinstance(colour, str | tuple) and colour not in ("auto", "none"):
                found = new.get(to_rgb(colour))
                if found is not None:
                    alpha = colour[3] if isinstance(colour, tuple) and len(colour) == 4 else None
                    changes[name] = found if alpha in (None, 1.0) else (found, alpha)
        if changes:
            artist.set(**changes)


def _pair_colours(before: _Palette, after: _Palette) -> Iterable[tuple[str, str]]:
    return zip(astuple(before), astuple(after), strict=True)


def _paint_figure(plot: PlotSpec, records: Sequence[StepMetrics], palette: _Palette) -> Figure:
    from matplotlib.ticker import MaxNLocator

    if not records:
        raise ValueError(f"nothing to draw in plot {plot.name}: no records")
    figure = _make_figure(plot.size, palette, layout=None)
    width, height = plot.size
    left, right, bottom, top = 0.72 / width, 1 - 0.12 / width, 0.48 / height, 1 - 0.34 / height
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    # Places in inches instead of a layout engine's, which draws everything once more to find them;
    # labels and title that follow the ticks are measured at each drawing.
    axes.xaxis.set_label_coords(0.5, (0.14 / height - bottom) / (top - bottom))
    axes.yaxis.set_label_coords((0.22 / width - left) / (right - left), 0.5)
    _prepare_axes(axes, plot, palette)
    plot.paint(axes, records, palette)
    # a single point or a constant would otherwise get ticks between steps
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    return figure


def draw_heat_maps(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Mapping[str, Sequence[Sequence[float]]],
    theme: Theme = "light",
) -> bytes:
    """Return a PNG of tables of shares, side by side.

    Args:
        title: heading of the picture.
        rows, columns: names along a table's sides.
        panels: heading of each table -> ``[rows][columns]`` of numbers from 0 to 1.
    """
    palette = _PALETTES[theme]
    width, height = 1.6 + (0.5 + 0.75 * len(columns)) * len(panels), 1.4 + 0.26 * len(rows)
    figure = _make_figure((max(width, 4.8), max(height, 2.4)), palette, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", color=palette.ink, fontsize=11, fontweight="bold")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, table) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(heading, color=palette.ink, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(colors=palette.ink, labelsize=8, length=0)
        axes.spines[:].set_visible(False)
        for y, numbers in enumerate(table):
            for x, share in enumerate(numbers):
                ink = "#000000" if share > 0.5 else "#ffffff"
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color=ink, fontsize=7)
    bar = figure.colorbar(image, ax=list(all_axes))
    bar.ax.tick_params(colors=palette.ink, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return _render_png(figure)


def _make_figure(
    size: tuple[float, float], palette: _Palette, layout: Literal["constrained"] | None
) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=144, layout=layout, facecolor=palette.background)
    FigureCanvasAgg(figure)
    return figure


def _render_png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", pil_kwargs={"compress_level": 3})
    return image.getvalue()


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


def _prepare_axes(axes: Axes, plot: PlotSpec, palette: _Palette) -> None:
    axes.set_facecolor(palette.background)
    axes.set_title(plot.title, loc="left", y=1.0, color=palette.ink, fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step", color=palette.ink, fontsize=9)
    axes.set_ylabel(plot.unit, color=palette.ink, fontsize=9)
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.ink, labelsize=9, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette.grid)
    for offset in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        offset.set_color(palette.ink)


def _draw_curve(
    axes: Axes, records: Sequence[StepMetrics], values: Sequence[float], colour: str
) -> None:
    """Draw one curve over zero, with headroom.

    The few points of a short run get markers; a single one would be invisible.
    """
    marker = "o" if len(records) <= 20 else None
    axes.plot([r.step for r in records], values, color=colour, lw=1.6, marker=marker, ms=4)
    finite = [value for value in values if math.isfinite(value)]
    axes.set_ylim(0, 1.1 * max(finite, default=0) or 1)


def _paint_loss(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    steps, losses = [r.step for r in records], [r.loss for r in records]
    if len(records) < 10:
        axes.plot(steps, losses, color=palette.main, lw=1.6, marker="o", ms=4, label="train")
    else:
        span = max(5.0, len(records) / 20)
        axes.plot(steps, losses, color=palette.main, lw=0.8, alpha=0.35, label="train, each step")
        axes.plot(
            steps,
            smooth_values(losses, span),
            color=palette.main,
            lw=2,
            label="train, moving average",
        )
    points = list_eval_points(records)
    if points:
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            color=palette.accent,
            lw=1.2,
            ls="--",
            marker="D",
            ms=5,
            label="held out",
        )
    _mark_steps(axes, records, palette)
    axes.legend(frameon=False, labelcolor=palette.ink, fontsize=9)


def _mark_steps(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    """Mark spikes of the loss, and at the upper edge the steps without an update."""
    spikes = [r for r in records if r.spike is not None]
    if spikes:
        axes.plot(
            [r.step for r in spikes],
            [r.loss for r in spikes],
            color=palette.accent,
            ls="",
            marker="^",
            ms=7,
            label="spike",
        )
    if failed := list_nonfinite_steps(records):
        axes.plot(
            failed,
            [0.97] * len(failed),
            color=palette.accent,
            ls="",
            marker="x",
            ms=7,
            transform=axes.get_xaxis_transform(),
            label="not finite, no update",
        )


def list_nonfinite_steps(records: Sequence[StepMetrics]) -> list[int]:
    """Return the steps that made no update because the loss or the gradient was not finite."""
    return [r.step for r in records if not math.isfinite(r.grad_norm)]


def _paint_lr(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    _draw_curve(axes, records, [r.lr for r in records], palette.second)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))  # 1e-4, as it is configured
    axes.yaxis.set_offset_position("right")  # the title is on the left


def _paint_grad_norm(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    norms = [r.grad_norm for r in records]
    _draw_curve(axes, records, norms, palette.second)
    norms = [norm for norm in norms if math.isfinite(norm)] or [0.0]
    if min(norms) > 0 and max(norms) > 10 * statistics.median(norms):
        axes.set_yscale("log")  # one outburst would flatten everything else
        axes.set_ylim(min(norms) / 1.3, max(norms) * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _paint_speed(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    from matplotlib.ticker import EngFormatter

    _draw_curve(axes, records, [r.tokens_per_s for r in records], palette.second)
    axes.yaxis.set_major_formatter(EngFormatter())


def _paint_memory(axes: Axes, records: Sequence[StepMetrics], palette: _Palette) -> None:
    _draw_curve(axes, records, [r.mem_peak / 2**30 for r in records], palette.second)


_WIDE, _SMALL = (9.6, 3.8), (4.8, 2.9)

PLOTS: tuple[PlotSpec, ...] = (
    PlotSpec("loss", "Loss", "nats per target token", _WIDE, _paint_loss),
    PlotSpec("lr", "Learning rate", "learning rate", _SMALL, _paint_lr),
    PlotSpec("grad_norm", "Gradient norm", "L2 norm before clipping", _SMALL, _paint_grad_norm),
    PlotSpec("tokens_per_s", "Throughput", "targets / s", _SMALL, _paint_speed),
    PlotSpec("memory", "Peak memory so far", "GiB, fullest rank", _SMALL, _paint_memory),
)
"""The plots of a report, in its order."""
