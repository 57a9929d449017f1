"""Axes of the pictures of a run: sizes, titles, legends (``train.plots`` draws on them)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_peft.train.svg import GRID, INK, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FONT_SIZE", "SMALL_SIZE", "WIDE_SIZE", "add_legend", "make_axes", "make_step_axes"]

SMALL_SIZE, WIDE_SIZE, FONT_SIZE = (4.6, 3.0), (9.6, 3.8), 10
"""Inches, and points of a text: at the width of a phone a small picture's text has 10 pixels."""


def make_step_axes(title: str, unit: str, is_wide: bool) -> tuple[Figure, Axes]:
    """Axes over optimizer steps, for use inside ``train.svg.drawing``."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = make_axes(title, unit, WIDE_SIZE if is_wide else SMALL_SIZE)
    axes.set_xlabel("optimizer step", color=INK, fontsize=FONT_SIZE)
    # a single point or a constant would otherwise get ticks between steps
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8 if is_wide else 5, integer=True, min_n_ticks=1)
    )
    return figure, axes


def make_axes(title: str, unit: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Places in inches instead of a layout engine's, which draws everything once more."""
    figure = make_figure(size)
    width, height = size
    left, right, bottom, top = 0.74 / width, 1 - 0.14 / width, 0.52 / height, 1 - 0.34 / height
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    # labels that follow the ticks are measured at each drawing
    axes.xaxis.set_label_coords(0.5, (0.14 / height - bottom) / (top - bottom))
    axes.yaxis.set_label_coords((0.2 / width - left) / (right - left), 0.5)
    axes.set_facecolor("none")
    _set_title(axes, title, 1.0)
    axes.set_ylabel(unit, color=INK, fontsize=FONT_SIZE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=FONT_SIZE, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    for offset in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        offset.set_color(INK)
    return figure, axes


def _set_title(axes: Axes, title: str, y: float) -> None:
    axes.set_title(title, loc="left", y=y, color=INK, fontsize=FONT_SIZE + 1, fontweight="bold")


def add_legend(axes: Axes) -> None:
    """Put the labels between the title and the axes, which give way: over the axes they would lie
    on the curves of a narrow plot."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    figure, box = axes.get_figure(), axes.get_position()
    assert figure is not None
    width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
    # inches, estimated: text is measured only as it is drawn
    columns = max(1, int(box.width * width / (0.45 + 0.06 * max(map(len, labels)))))
    taken = 0.2 * -(-len(labels) // columns) / height
    look: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": FONT_SIZE - 1}
    left = box.height - taken
    if left < box.height / 2:  # of many runs
        axes.legend(**look)
        return
    axes.set_position((box.x0, box.y0, box.width, left))
    axes.xaxis.set_label_coords(0.5, (0.14 / height - box.y0) / left)
    _set_title(axes, axes.get_title("left"), 1 + taken / left)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns}
    spacing = {"borderaxespad": 0.1, "borderpad": 0.1, "columnspacing": 1.2, "handlelength": 1.4}
    axes.legend(**look, **place, **spacing)
