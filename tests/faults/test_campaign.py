"""A dozen trials with fixed seeds, and the checks that judge them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.campaign import (
    KINDS,
    PHASES,
    EndCheck,
    draw_trials,
    format_row,
    measure_children_cpu,
    run_campaign,
)
from tests.faults.injection import Fault
from tests.faults.processes import Ended
from tests.faults.workloads import Job, compare_results, find_leftovers

TRIALS, SEED = 12, 3286


@pytest.mark.dist
def test_nothing_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    trials = draw_trials(TRIALS, SEED, most_ranks=2)
    outcomes = list(run_campaign(trials, tmp_path / "campaign", jobs=3, count=False))
    print("\n".join(map(format_row, outcomes)), f"{measure_children_cpu():.0f} s CPU", sep="\n")
    assert {o.trial.faults[0].phase for o in outcomes} == set(PHASES)
    assert {o.trial.faults[0].kind for o in outcomes} == set(KINDS)
    problems = [f"{format_row(o)}\n{problem}" for o in outcomes for problem in o.problems]
    assert not problems, "\n".join(problems)
    skipped = [o.skipped for o in outcomes if o.skipped]
    if skipped:
        pytest.skip(f"{len(skipped)} of {TRIALS} trials: {skipped[0]}")


def test_every_fault_comes_in_every_phase() -> None:
    trials = draw_trials(28, 5)
    pairs = {(t.faults[0].phase, t.faults[0].kind) for t in trials}
    assert len(pairs) == 28 == len(PHASES) * len(KINDS)
    assert trials == draw_trials(28, 5) and trials[:12] == draw_trials(12, 5)
    assert all(
        t.job.engine == "zero" for t in draw_trials(28, 5, ["zero"]) if t.job.verb == "train"
    )
    assert max(t.job.ranks for t in draw_trials(28, 5, most_ranks=2)) == 2


LINE = "dist-peft: rank 0 on h lost its peers: rank 1\n"
GOOD = Ended((1, -9), 8.0, True, (f"step 1/4\n{LINE}", ""))
KILL = Fault("kill", "step", rank=1)


def _write_run(run: Path) -> None:
    run.mkdir()
    (run / "log.txt").write_text("INFO step 1/4\nERROR rank 0 on h lost its peers: rank 1\n")
    text = '{"state": "failed", "step": 1, "reason": "lost its peers", "time": ""}'
    (run / "run_state.json").write_text(text)


def _find(run: Path, ended: Ended, fault: Fault = KILL) -> str:
    found = EndCheck(Job("train", "fsdp2", 2), fault, ended, run, thawed=False)
    return "\n".join(found.find_problems())


def test_a_good_end_has_no_problem(tmp_path: Path) -> None:
    _write_run(tmp_path / "run")
    assert _find(tmp_path / "run", GOOD) == ""


def _forget_reason(run: Path) -> None:
    (run / "log.txt").write_text("INFO step 1/4\n")


def _keep_running(run: Path) -> None:
    file = run / "run_state.json"
    file.write_text(file.read_text().replace("failed", "stopped"))


@pytest.mark.parametrize(
    ("ended", "spoil", "problem"),
    [
        (replace(GOOD, codes=(None, -9)), None, "no end within"),
        (replace(GOOD, codes=(-11, -9)), None, "codes"),
        (replace(GOOD, struck=False), None, "did not strike"),
        (replace(GOOD, outputs=(f"Traceback (most recent call last)\n{LINE}", "")), None, "trace"),
        (replace(GOOD, outputs=(f"{LINE}RuntimeError: gloo\n", "")), None, "last line"),
        (replace(GOOD, outputs=(LINE, "frames\n"), last_writer=1), None, "last line of all"),
        (GOOD, _forget_reason, "log.txt ends"),
        (GOOD, _keep_running, "run_state.json says"),
    ],
)
def test_a_bad_end_is_a_problem(
    tmp_path: Path, ended: Ended, spoil: Callable[[Path], None] | None, problem: str
) -> None:
    _write_run(tmp_path / "run")
    if spoil is not None:
        spoil(tmp_path / "run")
    assert problem in _find(tmp_path / "run", ended)


def test_a_signal_asks_all_ranks_to_stop(tmp_path: Path) -> None:
    _write_run(tmp_path / "run")
    signal = Fault("signal", "step", signal="SIGTERM")
    assert "codes (-15, 1)" in _find(tmp_path / "run", replace(GOOD, codes=(-15, 1)), signal)


def test_differences_and_leftovers_are_found(tmp_path: Path) -> None:
    assert compare_results({"step 0": 1.5, "x": 1}, {"step 0": 1.5, "x": 1}) == []
    (line,) = compare_results({"step 0": 1.5}, {"step 0": 1.25})
    assert line == "step 0: 1.5, undisturbed 1.25"
    assert len(compare_results({}, {"adapter/a": "12"})) == 1
    names = [
        ".out.partial/x",
        "run/run.lock",
        "run/checkpoints/.partial-step-000001/y",
        "run/.a.tmp",
    ]
    for name in (*names, "run/log.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = find_leftovers(tmp_path)
    assert found == [
        ".out.partial",
        "run/.a.tmp",
        "run/checkpoints/.partial-step-000001",
        "run/run.lock",
    ]
