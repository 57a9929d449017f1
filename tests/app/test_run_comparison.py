from pathlib import Path

import pytest

from dist_peft.app.run_comparison import compare_settings, list_outcome_table, read_runs
from dist_peft.core.errors import UserError
from tests.support.compared_runs import make_run


def test_outcomes_and_differences(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", 8, 2.0)
    two = make_run(tmp_path / "b", 16, 1.5, is_finished=False)
    runs = read_runs([one, two])
    table = dict(list_outcome_table(runs))
    assert table["Steps"] == ["3", "3"] and table["Target tokens"] == ["300", "300"]
    assert table["Held-out loss, first"] == ["4.0000", "4.0000"]
    assert table["Held-out loss, last"] == ["2.0000", "1.5000"]
    assert table["Targets/s (median)"] == ["100", "100"]
    assert table["Targets/s of a rank (median)"] == ["50", "-"]
    assert table["Straggler share (median)"] == ["25.0%", "25.0%"]
    assert table["Time in steps"] == ["6.0 s", "6.0 s"]
    assert "Reserved by the allocator" not in table
    assert compare_settings(runs, "settings") == [
        ("adapter.r", ["8", "16"]),
        ("adapter.use_dora", ["false", "true"]),
    ]
    assert compare_settings(runs, "environment") == []  # one run alone has any
    three = make_run(tmp_path / "c", 9, 1.0)
    differing = compare_settings(read_runs([one, three]), "environment")
    assert differing == [("Hardware", ["card 8", "card 9"])]


def test_equal_names_are_separated_by_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / side / "run", 8, 2.0) for side in ("x", "y")]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one", "two or more"),
        ("twice", "given twice"),
        ("empty", "is no run with a step done"),
        ("tasks", "tasks/rte"),
        ("config", "config.yaml cannot be read"),
        ("list", "holds no keys"),
        ("report", "report.json is not readable"),
        ("metrics", "line 1 is not a step record"),
    ],
)
def test_refused(tmp_path: Path, fault: str, message: str) -> None:
    good, other = make_run(tmp_path / "good", 8, 2.0), tmp_path / "other"
    if fault in ("config", "list", "report", "metrics"):
        make_run(other, 8, 2.0)
    else:
        other.mkdir()
    if fault == "tasks":
        make_run(other / "tasks" / "rte", 8, 2.0)
    if fault == "config":
        (other / "config.yaml").write_text("a: [")
    if fault == "list":
        (other / "config.yaml").write_text("[]")
    if fault == "report":
        (other / "report.json").write_text("{")
    if fault == "metrics":
        (other / "metrics.jsonl").write_text("x\n{}\n")
    chosen = {"one": [good], "twice": [good, other / ".." / "good"]}.get(fault, [good, other])
    with pytest.raises(UserError, match=message):
        read_runs(chosen)
