"""A plan as a stacked bar: parts of a rank's memory against the memory of its card."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_peft.core.errors import UserError
from dist_peft.plan.memory import MemoryPlan

__all__ = ["draw_memory_bar", "list_bar_parts"]

_COLOURS = {
    "rest": ("#0072b2", "#56b4e9", "#004c78", "#8cc8ee", "#22597a", "#a9d6f2"),
    "step": ("#d55e00", "#e69f00", "#a34700", "#f0c05a", "#7d3a07", "#f3d79b"),
    "assumed": ("#5c666e", "#8b959c", "#b4bcc2", "#d5dadd"),
}
"""Okabe & Ito's palette, darker and lighter; one family of colours for each kind of part."""

_INK, _LEAST_SHARE = "#333a40", 0.004


def list_bar_parts(memory: MemoryPlan) -> list[tuple[str, float, str]]:
    """Return (name, GiB, colour) of each part that can be seen; small ones of a kind are one."""
    parts: list[tuple[str, float, str]] = []
    for kind, colours in _COLOURS.items():
        items = [item for item in memory.items if item.kind == kind]
        items.sort(key=lambda item: -item.bytes)
        shown = [i for i in items if i.bytes >= _LEAST_SHARE * memory.total][: len(colours) - 1]
        rest = sum(item.bytes for item in items) - sum(item.bytes for item in shown)
        named = [(item.name, item.bytes) for item in shown]
        named += [(f"other ({kind})", rest)] if rest > 0 else []
        for (name, size), colour in zip(named, colours, strict=False):
            parts.append((name, size / 2**30, colour))
    return parts


def draw_memory_bar(memory: MemoryPlan, title: str, path: Path) -> None:
    """Write the picture to ``path``: ``.svg`` or ``.png``.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"--out {path}: pictures are written as .svg or .png")
    figure = Figure(figsize=(9.6, 3.4), dpi=144, layout="constrained", facecolor="#ffffff")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    begin = 0.0
    for name, size, colour in list_bar_parts(memory):
        label = f"{name}, {size:.2f} GiB"
        axes.barh(0, size, left=begin, color=colour, label=label, edgecolor="#ffffff", lw=0.6)
        begin += size
    limit = memory.limit / 2**30
    axes.axvline(limit, color="#000000", lw=1.6, ls="--")
    text = f"card, {limit:.1f} GiB"
    axes.text(0.99 * limit, 0.55, text, color=_INK, fontsize=9, va="bottom", ha="right")
    axes.set_xlim(0, 1.04 * max(limit, begin))
    axes.set_ylim(-0.5, 0.72)
    axes.set_yticks([])
    axes.set_xlabel("GiB of the fullest rank", color=_INK, fontsize=9)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8, labelcolor=_INK)
    try:
        # text that can be found and read aloud; the same plan gives the same bytes
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan"}):
            form = path.suffix[1:].lower()
            metadata = {"Date": None} if form == "svg" else None
            figure.savefig(path, format=form, metadata=metadata)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None
