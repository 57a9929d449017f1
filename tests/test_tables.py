"""Tables say what was counted or measured: of the code, of removed tests, of a docs page."""

import json
from pathlib import Path
from typing import Any

from benchmarks import domain_table, support_page
from benchmarks.code_table import SourceTable
from benchmarks.methods_table import (
    FIRST_RATES,
    NAME,
    PAGE,
    RATES,
    RESULTS,
    SEEDS,
    Cell,
    find_missing,
    find_next_rates,
    read_cells,
    render,
    replace_table,
)
from tests.support.removed_tests import TestFunction, find_removed_tests, iterate_tests

SOURCE = '''"""A module."""

import math


def scale(x: float, /, *, by: float = 1.0) -> float:
    """Scale.

    Twice, or not.
    """
    # a comment of its own
    import os  # not counted as one

    if x > 0 and by > 0 or os.sep:
        return math.sqrt(x)
    return [y for y in (x, by) if y][0]


def untyped(x):
    return x
'''


def test_code_table_counts_a_module() -> None:
    table = SourceTable()
    table.add_file(SOURCE)
    table.add_file("x = 1\n")
    rows = dict(table.list_rows(test_lines=21))
    assert rows["files"] == "2" and rows["lines"] == "21" and rows["functions"] == "2"
    assert rows["function lines median/p95/max"] == "6/11/11"
    assert rows["annotated functions"] == "50 %" and rows["modules with docstring"] == "50 %"
    assert rows["docstring lines"] == "24 %" and rows["comment lines"] == "4.8 %"
    assert rows["function-local imports"] == "1"
    # 1, an if, two operands more, a comprehension and its condition
    assert rows["complexity mean/p95/max"] == "3.50/6/6"
    assert rows["lines of tests : source"] == "1.00"


def read_tests(**sources: str) -> list[TestFunction]:
    return [test for name, text in sources.items() for test in iterate_tests(name, text)]


def test_removed_tests_are_those_of_which_there_are_fewer() -> None:
    old = read_tests(
        a="def test_refused():\n    assert run(1) == 2\n",
        b="def test_refused():\n    assert load('x') is None\n\ndef test_kept():\n    pass\n",
    )
    new = read_tests(
        c="def test_refused():\n    assert run(1) == 2\n\ndef test_kept():\n    pass\n",
        d="def test_missing_file_is_refused():\n    assert load('x') is None\n",
    )
    (removed,) = find_removed_tests(old, new)
    assert removed.old.path == "b" and removed.likeness == 1
    assert removed.new is not None and removed.new.name == "test_missing_file_is_refused"
    assert not find_removed_tests(old, old)


ROOT = Path(__file__).parents[1]


def read_result(name: str) -> list[dict[str, Any]]:
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    rows: list[dict[str, Any]] = found["result"]["rows"]
    return rows


def test_tables_of_pruning_are_the_results() -> None:
    page = (ROOT / "docs" / "pruning.md").read_text().replace("**", "")
    measured = {
        (row["method"], row["sparsity"]): row["perplexity"]
        for row in read_result("prune_stories260K-hf")
    }
    assert f"Dense: {measured['dense', '0']:.3f}." in page
    sparsities = [sparsity for method, sparsity in measured if method == "wanda"]
    assert len(sparsities) == 4
    for sparsity in sparsities:
        shown = [
            f"{measured[method, sparsity]:.3f}" for method in ("magnitude", "wanda", "sparsegpt")
        ]
        assert f"| {sparsity} | {' | '.join(shown)} |" in page
    for row in read_result("prune_recovery_stories260K-hf"):
        shown = [f"{row[key]:.3f}" for key in ("pruned", "merged", "kept", "trained")]
        time = row["sparse_seconds"] / row["plain_seconds"]
        assert row["kept_zeros"] == row["trained_zeros"]
        ends = f"{row['trained_zeros']:.1%} | {time:.2f}"
        assert f"| {row['sparsity']} | {' | '.join(shown)} | {ends} |" in page


def make_cell(method: str, rate: float, seed: int, loss: float) -> Cell:
    return Cell(method, rate, seed, loss, 7.0, 1234, 2**20, 5.0)


def make_sweep(method: str, losses: tuple[float, ...]) -> list[Cell]:
    return [
        make_cell(method, rate, SEEDS[0], loss)
        for rate, loss in zip(FIRST_RATES, losses, strict=True)
    ]


def test_methods_table_runs_what_is_missing_and_ranks_by_loss() -> None:
    full = make_sweep("full", (3, 2, 4, 5))
    best = FIRST_RATES[1]
    assert find_missing(full[:1], "full") == [(rate, SEEDS[0]) for rate in FIRST_RATES[1:]]
    assert find_missing(full, "full") == [(best, seed) for seed in SEEDS[1:]]
    assert find_missing(full, "ia3") == [(rate, SEEDS[0]) for rate in FIRST_RATES]
    others = [make_cell("full", best, seed, 2.5) for seed in SEEDS[1:]]
    prompt = make_sweep("prompt, 20", (1.5, 1.0, 1.5, 1.5))
    assert "| prompt, 20 |" not in render([*full, *others, *prompt])
    prompt += [make_cell("prompt, 20", best, seed, 1.0) for seed in SEEDS[1:]]
    assert not find_missing([*full, *others], "full")
    text = render([*full, *others, *prompt])
    assert "| full | 0.003 | 2.333 ± 0.289 | 1,234 | 1 | 5.0 |" in text
    assert text.index("| prompt, 20 |") < text.index("| full |")
    assert "here, by held-out loss: prompt, 20 > full" in text
    page = "a\n<!-- methods_table: x -->\nold\n<!-- end -->\nb"
    assert replace_table(page, "new") == "a\n<!-- methods_table: x -->\n\nnew\n\n<!-- end -->\nb"


def test_methods_table_widens_the_rates_while_the_best_is_at_an_edge() -> None:
    rising = make_sweep("full", (5, 4, 3, 2))
    wider = RATES[RATES.index(FIRST_RATES[-1]) + 1]
    assert find_missing(rising, "full") == [(wider, SEEDS[0])]
    worse = [*rising, make_cell("full", wider, SEEDS[0], 2.5)]
    assert find_missing(worse, "full") == [(FIRST_RATES[-1], seed) for seed in SEEDS[1:]]
    falling = dict(zip(FIRST_RATES, (2.0, 3.0, 4.0, 5.0), strict=True))
    assert find_next_rates(falling) == [RATES[RATES.index(FIRST_RATES[0]) - 1]]
    # at the end of all rates nothing is left, and the row has its mark
    lower = [(rate, 1.0 + n / 10) for n, rate in enumerate(RATES[: RATES.index(FIRST_RATES[0])])]
    assert find_next_rates({**falling, **dict(lower)}) == []
    ended = make_sweep("full", (2, 3, 4, 5)) + [
        make_cell("full", rate, SEEDS[0], loss) for rate, loss in lower
    ]
    ended += [make_cell("full", RATES[0], seed, 1.0) for seed in SEEDS[1:]]
    assert f"| full | {RATES[0]:g}* | 1.000" in render(ended)


def test_methods_table_of_the_page_is_that_of_the_result() -> None:
    page, cells = PAGE.read_text(), read_cells(RESULTS / f"{NAME}.json")
    assert replace_table(page, render(cells)) == page


def test_domain_table_of_the_pages_is_that_of_the_result() -> None:
    outcomes = domain_table.read_outcomes()
    assert not domain_table.find_missing(outcomes)
    first = domain_table.find_missing(outcomes[1:])
    assert first == [(outcomes[0].weight, outcomes[0].seed)]
    for page in domain_table.PAGES:
        text = page.read_text()
        assert replace_table(text, domain_table.render(outcomes), domain_table.NAME) == text


def test_page_of_supported_types_equals_its_results() -> None:
    found = json.loads(support_page.RESULT.read_text())
    text = support_page.format_support_page(found)
    assert support_page.PAGE.read_text(encoding="utf-8") == text
    assert all(f"`{row['type']}`" in text for row in found["result"]["types"])


def test_page_of_supported_types_has_a_reason_for_each_that_does_not_work() -> None:
    rows: list[dict[str, object]] = [
        {"type": "a", "outcome": "works", "packing": "isolated", "as_published": "is joined"},
        {"type": "b", "outcome": "refused", "message": "wants an image"},
        {"type": "c", "outcome": "not tried", "message": "no | library"},
    ]
    machine = {"transformers": "1", "date": "today"}
    text = support_page.format_support_page({"machine": machine, "result": {"types": rows}})
    assert r"| `a` \* | yes | - | - | - |" in text
    assert "| `a` | is joined |" in text and "| `b` | wants an image |" in text
    assert r"| `c` | not tried | no \| library |" in text
