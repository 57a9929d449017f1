"""matplotlib figures as SVG that is part of a page, follows its theme, and reads on a phone.

Text stays text, so that it can be found, read aloud and scaled. Colours are CSS variables
(``--ink``, ``--curve-1``, ...) which the page, or the file by itself, defines for light and dark
readers: one drawing serves both. Curves have the colours of Okabe & Ito's palette, which
colour-blind readers can distinguish.

matplotlib's object interface: no display, no global state. It is imported by the functions that
draw, since it takes most of a second and ranks above 0 draw nothing.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CURVES", "GRID", "INK", "THEME_CSS", "drawing", "make_figure", "render_svg"]

INK, GRID = "#333a40", "#e3e6e8"

CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of curves, in the order in which a plot uses them."""

_DARK_INK, _DARK_GRID = "#c9d1d6", "#343b41"
_DARK_CURVES = ("#56b4e9", "#e69f00", "#2ec4a0", "#e7a3c7", "#f0c05a", "#a9d6f2")


def _format_variables(ink: str, grid: str, curves: tuple[str, ...]) -> str:
    named = {"ink": ink, "grid": grid}
    named |= {f"curve-{number}": colour for number, colour in enumerate(curves, 1)}
    return ":root { " + " ".join(f"--plot-{name}: {value};" for name, value in named.items()) + " }"


THEME_CSS = (
    f"{_format_variables(INK, GRID, CURVES)}\n"
    "@media (prefers-color-scheme: dark) "
    f"{{ {_format_variables(_DARK_INK, _DARK_GRID, _DARK_CURVES)} }}"
)
"""Definitions of the colours that the pictures use."""

_VARIABLES = {INK: "ink", GRID: "grid"} | {c: f"curve-{n}" for n, c in enumerate(CURVES, 1)}
_COLOUR = re.compile("|".join(_VARIABLES))


@contextmanager
def drawing() -> Iterator[None]:
    """Settings under which figures are made and rendered.

    Names of runs and tasks are text, never formulas, and may have letters that the font which
    measures them does not have.
    """
    from matplotlib import rc_context

    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "dist_peft", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def make_figure(size: tuple[float, float], *, constrained: bool = False) -> Figure:
    """Return an empty figure without background; ``size``: inches, 72 units of the SVG each."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    layout = "constrained" if constrained else None
    figure = Figure(figsize=size, dpi=72, layout=layout, facecolor="none")  # type: ignore[arg-type]
    FigureCanvasSVG(figure)
    return figure


def render_svg(figure: Figure, title: str, name: str, *, is_file: bool = False) -> str:
    """Return the figure as an ``<svg>`` element.

    Args:
        title: what is read aloud for the picture.
        name: of the picture in its page; makes its identifiers unique there.
        is_file: for a file of its own, which defines the colours itself.
    """
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    text = image.getvalue()
    body = text[text.index("<defs>") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to groups
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace("xlink:href", "href")
    body = _COLOUR.sub(lambda found: f"var(--plot-{_VARIABLES[found.group()]})", body)
    body = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", body)
    body = re.sub(r"\n\s*", "\n", body)
    width, height = figure.get_size_inches() * 72
    space = ' xmlns="http://www.w3.org/2000/svg"' if is_file else ""
    style = f"<style>{THEME_CSS}</style>\n" if is_file else ""
    return (
        f'<svg{space} viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">\n'
        f"{style}{body}</svg>\n"
    )
