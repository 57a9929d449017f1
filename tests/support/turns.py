"""Cells of a large cross product take turns, so that each run of ``.ci/run`` has a part of them.

A cell that is marked ``turn(number, of)`` runs in turn ``number`` and each ``of``-th after it. The
environment variable ``DIST_PEFT_TURN`` says which turn it is: ``.ci/run`` takes it from the commit,
and without it, or with ``all``, nothing is left out.

Turns are for products whose factors, and pairs of factors where that can be, run in every turn:
``number_turn`` deals triples out in this way. What a cell alone shows is no such cell.

Files whose processes show one method, one feature or one launcher take turns of three
(``ALTERNATE_FILES``), by another digit of the turn, so that cells that take turns in such a file
all come. Engines, resuming, failures, the first command of README and the products above run in
every turn.

``tests/conftest.py`` calls ``keep_present_turn``.
"""

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "ALTERNATE_FILES",
    "PROCESS_MARKS",
    "TESTS",
    "TURNS_OF_CELLS",
    "VARIABLE",
    "keep_present_turn",
    "list_selected",
    "number_turn",
    "pytest_report_header",
    "read_turn",
]

TESTS = Path(__file__).parents[1]
VARIABLE = "DIST_PEFT_TURN"
MARK = "turn"
TURNS_OF_CELLS = 24
"""Every number of turns that cells take divides it."""
PROCESS_MARKS = ("dist", "e2e", "launcher")
ALTERNATE_FILES = (
    (
        "app/sweep/test_sweep_run.py",
        "app/test_adalora.py",
        "app/test_classification.py",
        "app/test_conv1d.py",
        "app/test_full.py",
        "app/test_fusion.py",
        "app/test_ia3.py",
        "app/test_qalora.py",
        "app/test_quantized_base.py",
        "engine/test_outer_units.py",
        "export/formats/test_kept_nf4.py",
        "launch/test_mpi.py",
        "launch/test_slurm.py",
        "test_gpu_scripts.py",
    ),
    (
        "app/test_adapter_bank.py",
        "app/test_base_content.py",
        "app/test_domain_matrix.py",
        "app/test_float_bases.py",
        "app/test_pruning.py",
        "app/test_quality.py",
        "app/test_through_quantizer.py",
        "app/test_virtual_tokens.py",
        "launch/test_slurm_losses.py",
        "launch/test_torchrun.py",
        "plan/test_run_plan.py",
        "quickstart/test_task.py",
        "train/test_nonfinite.py",
    ),
    (
        "adapters/test_adapter_switch.py",
        "app/test_bottleneck.py",
        "app/test_data_initialization.py",
        "app/test_domain_adversarial.py",
        "app/test_exact_ranks.py",
        "app/test_experts.py",
        "app/test_peft_form_report.py",
        "app/test_prequantized.py",
        "app/test_run_samples.py",
        "app/test_task_switching.py",
        "app/test_tasks.py",
        "app/test_verified_export.py",
        "engine/test_every_row_learns.py",
        "faults/test_campaign.py",
        "launch/test_deepspeed.py",
        "launch/test_hangs.py",
        "plan/test_fake_world.py",
        "test_wheel.py",
    ),
)
"""Files below ``tests`` whose tests of real processes run in every third turn, by turn."""


def read_turn() -> int | None:
    """Return the turn that the environment asks for; None: all of them."""
    text = os.environ.get(VARIABLE, "all")
    if text == "all":
        return None
    if not text.isdecimal():
        raise pytest.UsageError(f"{VARIABLE} is {text!r}: a number, or all")
    return int(text)


def number_turn(*factors: tuple[Hashable, Sequence[Any]], of: int) -> pytest.MarkDecorator:
    """Return the mark of the cell that has these values, each given with all values of its factor.

    The places of the values are added up. Of three factors with ``of`` values each, every turn thus
    has all pairs of values of any two: a Latin square.
    """
    return pytest.mark.turn(sum(values.index(value) for value, values in factors) % of, of)


def list_selected(session: pytest.Session, test: Any) -> list[dict[str, Any]]:
    """Return the parameters of the cells of ``test`` that this session runs, for a fixture that
    makes what they look at."""
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params for item in functions if item.function is test]


def keep_present_turn(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove the collected tests whose turn it is not, as ``-k`` does."""
    turn = read_turn()
    if turn is None:
        return
    present = turn // TURNS_OF_CELLS % len(ALTERNATE_FILES)
    waiting_files = [files for i, files in enumerate(ALTERNATE_FILES) if i != present]
    absent = {TESTS / name for files in waiting_files for name in files}
    kept: list[pytest.Item] = []
    waiting: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker(MARK)
        assert mark is None or TURNS_OF_CELLS % mark.args[1] == 0, item.nodeid
        comes = mark is None or turn % mark.args[1] == mark.args[0]
        if item.path in absent and any(item.get_closest_marker(name) for name in PROCESS_MARKS):
            comes = False
        (kept if comes else waiting).append(item)
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = kept


def pytest_report_header() -> str:
    turn = read_turn()
    if turn is None:
        return "every turn of the tests that take turns"
    return f"turn {turn} of the tests that take turns; {VARIABLE}=all: every turn"
