"""Write ``docs/support.md``: model types that work, and those that are refused with the reason.

``python benchmarks/support_page.py`` after ``benchmarks/families.py``, whose results it reads. A
test compares the page.
"""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["format_support_page"]

_ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = _ROOT / "benchmarks/results/families.json", _ROOT / "docs/support.md"

_TEXT = """# Supported model types

Of the {count} causal and conditional model types of transformers {transformers}, {works} passed
the checks of `benchmarks/families.py` on a tiny random model ({date}, CPU): load, the logits of
transformers, gradients of LoRA on NF4. {refused} are refused with a message, {missing} were not
tried or crash. Models with towers for images or sound are saved as they are published, with the
towers, and trained on text; towers of `fast_vlm`, `gemma3n` and `perception_lm` need timm, that of
`inkling_mm_model` scipy. Made by `python benchmarks/support_page.py`.

## Work

Each was trained for three steps on one rank and on two (fsdp2): 2 ranks is the largest difference
of a loss. Merge and GGUF are errors of the logits over the change by training, of a merge in
float32 into the base as it was trained, loaded by transformers, and of an F16 file, loaded by
llama.cpp (xllamacpp) or transformers. A dash: not run, or refused ([below](#formats-that-refuse)).
A star: in the files as published tensors are joined or turned, which is [refused](#blocked); the
row is of a base that transformers wrote with `save_pretrained(..., save_original_format=False)`.

| type | `data.packing` | 2 ranks | merge | GGUF |
|---|---|---|---|---|
{works_table}

## Exports

Errors over the change by training, by the format's library; 8 bits in groups of 32 where a format
has a choice, `fp8` in tiles of 32 x 32. `gptq` and `awq` were written and not loaded here
([export.md](export.md#formats) has figures). n/v: not verified, as kernels of bitsandbytes on this
CPU compute with multiples of 64 columns and of 32 rows only, which a linear of the small model has
not. Text: the library's message. Experts of some types stay dense
([export.md](export.md#mixtures-and-classifiers-by-format)).

| type | {formats} |
|---|{dashes}
{exports}

## Formats that refuse

| format | reason | types |
|---|---|---|
{obstacles}

## Blocked

| type | message |
|---|---|
{blocked}

## Not tried

{untried}
"""

_FORMATS = (
    "gguf",
    "mlx",
    "hf-metal",
    "compressed-tensors",
    "fp8",
    "mxfp4",
    "bnb-nf4",
    "gptq",
    "awq",
)


def format_support_page(found: dict[str, Any]) -> str:
    """Return the page for the contents of ``families.json``."""
    types = found["result"]["types"]
    names = {
        outcome: [row for row in types if row["outcome"] == outcome]
        for outcome in ("works", "refused")
    }
    others = [row for row in types if row["outcome"] not in names]
    exported = [row for row in names["works"] if set(row.get("runs", ())) - {"gguf"} - _BASIC]
    return _TEXT.format(
        works=len(names["works"]),
        count=len(types),
        refused=len(names["refused"]),
        missing=len(others),
        transformers=found["machine"]["transformers"],
        date=found["machine"]["date"],
        works_table="\n".join(map(_format_working, names["works"])),
        formats=" | ".join(f"`{name}`" for name in _FORMATS),
        dashes="---|" * len(_FORMATS),
        exports="\n".join(map(_format_exports, exported)),
        obstacles="\n".join(_list_obstacles(names["works"])),
        blocked="\n".join(
            f"| `{row['type']}` | {_escape(row.get('as_published') or row['message'])} |"
            for row in types
            if row["outcome"] == "refused" or "as_published" in row
        ),
        untried="\n".join(_list_untried(others)) or "None.",
    )


_BASIC = {"ranks", "merge"}


def _format_working(row: dict[str, Any]) -> str:
    runs = row.get("runs", {})
    packing = "yes" if row["packing"] == "isolated" else "refused"
    cells = [_format_figure(runs.get(name)) for name in ("ranks", "merge", "gguf")]
    star = r" \*" if "as_published" in row else ""
    return f"| `{row['type']}`{star} | {packing} | {' | '.join(cells)} |"


def _list_untried(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each type that crashes, or that transformers does not run here, with the reason."""
    head = ["| type | outcome | message |", "|---|---|---|"]
    lines = [f"| `{row['type']}` | {row['outcome']} | {_escape(row['message'])} |" for row in rows]
    return [*head, *lines] if lines else []


def _format_exports(row: dict[str, Any]) -> str:
    runs, refused = row["runs"], row["formats"]
    cells = ["refused" if name in refused else _format_figure(runs.get(name)) for name in _FORMATS]
    return f"| `{row['type']}` | {' | '.join(cells)} |"


def _format_figure(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return "n/v" if "on this machine" in value else _escape(value)[:120]
    return "0" if value == 0 else f"{value:.1e}"


def _list_obstacles(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each format and reason; types that share it are listed, or counted."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get("formats", {}).items():
            general = re.sub(r", not for [\w-]+", "", reason)
            found.setdefault((name, general), []).append(row["type"])
    lines = []
    for (name, reason), types in sorted(found.items()):
        listed = ", ".join(f"`{kind}`" for kind in types)
        lines.append(
            f"| `{name}` | {_escape(reason)} | {listed if len(types) < 30 else len(types)} |"
        )
    return lines


def _escape(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(format_support_page(json.loads(RESULT.read_text())), encoding="utf-8")
