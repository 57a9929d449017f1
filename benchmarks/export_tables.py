"""Tables of measured errors in docs/export.md, generated from the results of the benchmarks.

    python benchmarks/export_tables.py            # print
    python benchmarks/export_tables.py --write    # write them into docs/export.md

A table stands between ``<!-- NAME: ... -->`` and ``<!-- end -->``. A test compares the page with
what this script generates from ``benchmarks/results``.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_peft.export.formats.registry import FORMATS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "export.md"

TEXTS = {"tinystories": "TinyStories", "tinyshakespeare": "Shakespeare"}
METHODS = ("LoRA", "PiSSA", "LoftQ")
KEPT_FORMS = {
    "peft, original base": "`peft` on the original base",
    "peft, base in 4 bits": "`peft` on the base that bitsandbytes quantizes to NF4",
    "hf-bf16, original": "`hf-bf16`",
    "hf-bf16, decoded": "`hf-bf16 --base decoded`",
    "bnb-nf4, merged": "`bnb-nf4`",
    "bnb-nf4, kept": "`bnb-nf4 --keep-adapter`",
}
"""Forms of ``export_error.py``, as the page names them."""


def read_measured(name: str) -> list[dict[str, Any]]:
    """Return the measurements of ``results/NAME.json``."""
    measured: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["result"][
        "measured"
    ]
    return measured


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def render_percent(shares: Sequence[float], digits: int = 1) -> str:
    """Render the mean of some shares in percent; a dash if there are none."""
    return f"{100 * sum(shares) / len(shares):.{digits}f}" if shares else "-"


def render_initializations() -> str:
    """Render the errors of forms of a LoRA, PiSSA or LoftQ adapter (``export_error.py``)."""
    results = {text: read_measured(f"export_error_{text}") for text in TEXTS}
    header = [""]
    for shown in TEXTS.values():
        header += [f"{shown}: {METHODS[0]}", *METHODS[1:]]

    def collect(text: str, method: str, form: str, key: str) -> list[float]:
        rows = [r for r in results[text] if (r["method"], r["form"]) == (method, form)]
        return [r[key] for r in rows if r[key] is not None]

    columns = [(text, method) for text in TEXTS for method in METHODS]
    rows = [
        [label, *(render_percent(collect(*column, form, "error")) for column in columns)]
        for form, label in KEPT_FORMS.items()
    ]
    weights = "weights of `peft` on the original base (logged by the run)"
    first = next(iter(KEPT_FORMS))
    rows.append([weights, *(render_percent(collect(*c, first, "weights")) for c in columns)])
    return render_table(header, rows)


def render_formats() -> str:
    """Render the errors of every format (``export_formats.py``)."""
    measured = read_measured("export_formats")
    runs, forms = (list(dict.fromkeys(row[key] for row in measured)) for key in ("run", "form"))
    errors = {(row["form"], row["run"]): row["error"] for row in measured}
    places = {name: i for i, name in enumerate(FORMATS)}
    rows = [
        [
            f"`{form}`",
            *(render_percent([errors[form, r]] if (form, r) in errors else [], 2) for r in runs),
        ]
        for form in sorted(forms, key=lambda form: (places[form.split()[0]], len(form)))
    ]
    return render_table(["error, % of the change by training", *runs], rows)


TABLES = {
    "initializations": ("export_error", render_initializations),
    "formats": ("export_formats", render_formats),
}
"""Name of the table -> the script that measures it, and how it is rendered."""


def fill_tables(text: str) -> str:
    """Return a page with its tables generated again.

    Raises:
        ValueError: the page has no place for a table.
    """
    for name, (script, render) in TABLES.items():
        start = (
            f"<!-- {name}: from benchmarks/results/{script}*.json by "
            "benchmarks/export_tables.py -->"
        )
        pattern = re.compile(re.escape(start) + r"\n.*?<!-- end -->", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no place for table {name}: {start}")
        block = f"{start}\n\n{render()}\n\n<!-- end -->"
        text = pattern.sub(lambda match, block=block: block, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into docs/export.md")
    if parser.parse_args().write:
        PAGE.write_text(fill_tables(PAGE.read_text()))
        return
    for name, (_, render) in TABLES.items():
        print(f"{name}\n\n{render()}\n")


if __name__ == "__main__":
    main()
