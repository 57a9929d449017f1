"""The page of reports and comparisons: self-contained HTML for any screen.

Pictures are inline SVG, there is no script and no link to elsewhere; the page follows the reader's
light or dark setting.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dist_peft.train.run_summary import Row
from dist_peft.train.svg import THEME_CSS

__all__ = ["ComparisonTable", "Picture", "ReportSection", "render_page"]


@dataclass(frozen=True)
class ReportSection:
    """An optional part of the report.

    Attributes:
        title: heading.
        rows: a table of (label, value).
        texts: (label, text) blocks, shown with their line breaks.
    """

    title: str
    rows: tuple[Row, ...] = ()
    texts: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture as SVG elements.

    Attributes:
        svg: at the width of a phone or half a page.
        wide: at the width of a page, shown instead where there is room; empty: none.
    """

    svg: str
    wide: str = ""


@dataclass(frozen=True)
class ComparisonTable:
    """Values of several runs by row: (label, a value for each of ``columns``)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def render_page(
    name: str,
    *,
    kind: str = "training report",
    headline: str,
    tables: Sequence[tuple[str, Sequence[Row]]] = (),
    comparisons: Sequence[ComparisonTable] = (),
    pictures: Iterable[Picture] = (),
    sections: Sequence[ReportSection] = (),
    config: str | None = None,
) -> str:
    """Return the page; all text is escaped, pictures are taken as they are.

    Args:
        name: heading.
        kind: of the page, in its title.
        headline: the result in a sentence.
        tables: (title, rows), in two columns where there is room; empty ones are left out.
        config: the resolved configuration, folded.
    """
    return _TEMPLATE.render(
        name=name,
        kind=kind,
        headline=headline,
        tables=tables,
        comparisons=comparisons,
        pictures=list(pictures),
        sections=sections,
        config=config,
        theme_css=THEME_CSS,
        short=Markup(' class="short"'),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


_TEMPLATE = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }}: {{ kind }}</title>
<style>
{{ theme_css | safe }}
:root { --page: #f5f6f7; --card: #ffffff; --ink: #22282d; --soft: #5c666e; --rule: #e3e6e8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1c2024; --ink: #e2e7ea; --soft: #9aa5ad; --rule: #343b41; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 3rem; max-width: 64rem; background: var(--page);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.1rem; }
h3 { margin: 1rem 0 .3rem; font-size: .95rem; color: var(--soft); }
header p, footer p { margin: .3rem 0 1.5rem; color: var(--soft); }
section, details { margin: 1rem 0; padding: 1rem 1.25rem; background: var(--card);
                   border: 1px solid var(--rule); border-radius: 8px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
        gap: 1rem; margin: 1rem 0; }
.pair > section { margin: 0; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0; border-top: 1px solid var(--rule); vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { padding-right: 1rem; text-align: left; font-weight: normal; color: var(--soft); }
td { text-align: right; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
         gap: .5rem; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
.many td, .many thead th { padding-left: 1rem; overflow-wrap: normal; }
.many thead th { padding-right: 0; text-align: right; color: var(--ink); }
td.short { white-space: nowrap; }  /* a number and its unit */
.narrow { display: none; }
@media (max-width: 600px) {
  body { padding: 1rem .5rem 2rem; }
  section, details { padding: .75rem .6rem; }
  .wide { display: none; }
  .narrow { display: block; }
}
pre { margin: 0; padding: .75rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      background: var(--page); border-radius: 6px; font: .85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: bold; }
details pre { margin-top: .8rem; }
</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<p>{{ headline }}</p>
</header>
<div class="pair">
{% for title, rows in tables if rows %}
<section><h2>{{ title }}</h2>
<table>
{% for label, value in rows %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></section>
{% endfor %}
</div>
{% if pictures %}
<section class="plots" aria-label="Curves">
{% for picture in pictures %}
{% if picture.wide %}
<figure class="wide">
{{ picture.wide | safe }}</figure>
{% endif %}
<figure{% if picture.wide %} class="narrow"{% endif %}>
{{ picture.svg | safe }}</figure>
{% endfor %}
</section>
{% endif %}
{% for table in comparisons %}
<section><h2>{{ table.title }}</h2>
<div class="scroll"><table class="many">
<thead><tr><th></th>
{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}
</tr></thead>
{% for label, values in table.rows %}
<tr><th scope="row">{{ label }}</th>
{% for value in values %}
<td{{ short if value | length < 16 else '' }}>{{ value }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div></section>
{% endfor %}
{% for section in sections %}
<section><h2>{{ section.title }}</h2>
{% if section.rows %}
<table>
{% for label, value in section.rows %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for label, text in section.texts %}
<h3>{{ label }}</h3>
<pre>{{ text }}</pre>
{% endfor %}
</section>
{% endfor %}
{% if config is not none %}
<details><summary>Resolved configuration</summary>
<pre>{{ config }}</pre>
</details>
{% endif %}
<footer><p>Written {{ written }} by dist_peft.</p></footer>
</body>
</html>
""")
