"""Write ``docs/support.md``: model types that work, and those that are refused with the reason.

``python benchmarks/support_page.py`` after ``benchmarks/families.py``, whose results it reads. A
test compares the page.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["format_support_page"]

_ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = _ROOT / "benchmarks/results/families.json", _ROOT / "docs/support.md"

_TEXT = """# Supported model types

Of the {count} causal language model types of transformers {transformers}, {works} passed the checks
of `benchmarks/families.py` on a tiny random model ({date}, CPU): load, the logits of transformers,
gradients of LoRA on NF4. {refused} are refused with a message, {missing} were not tried. Made by
`python benchmarks/support_page.py`.

## Work

Types whose packed documents are kept apart: {isolated}.

Types that refuse `data.packing: true`: {unpacked}.

## Blocked

| type | message |
|---|---|
{blocked}

Not tried: {untried}.
"""


def format_support_page(found: dict[str, Any]) -> str:
    """Return the page for the contents of ``families.json``."""
    types = found["result"]["types"]
    names = {
        outcome: [row for row in types if row["outcome"] == outcome]
        for outcome in ("works", "refused")
    }
    others = [row for row in types if row["outcome"] not in names]
    blocked = [
        f"| `{row['type']}` | {str(row['message']).replace('|', chr(92) + '|')} |"
        for row in names["refused"]
    ]
    by_packing = {
        kind: [row for row in names["works"] if (row["packing"] == "isolated") == kind]
        for kind in (True, False)
    }
    return _TEXT.format(
        works=len(names["works"]),
        count=len(types),
        refused=len(names["refused"]),
        missing=len(others),
        transformers=found["machine"]["transformers"],
        date=found["machine"]["date"],
        isolated=_list_types(by_packing[True]),
        unpacked=_list_types(by_packing[False]),
        blocked="\n".join(blocked),
        untried=", ".join(f"`{row['type']}` ({row['outcome']})" for row in others) or "none",
    )


def _list_types(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"`{row['type']}`" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(format_support_page(json.loads(RESULT.read_text())), encoding="utf-8")
