"""Domain-adversarial training on quantized bases, on every engine, through changes of both.

A run begins on an engine, is cut short, and is resumed on the next engine, at another number of
ranks, as in ``test_matrix.py``::

    single -> fsdp2 (2 ranks) -> zero (3 ranks; INT4: stage 2, NF4: 3) -> single

and what fsdp2 left on 2 ranks is also resumed by fsdp2 on 3. The losses, those of the domains, the
hits of the discriminator and the schedule of the reversal must be those of one process that was
never cut, and so must the public adapter, which has no discriminator.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.step_metrics import StepMetrics, read_metrics
from tests.support.classification_runs import domain_tree, save_classifier_base
from tests.support.dist import run_ranks
from tests.support.story_runs import NF4, train

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.dist

STEPS, CUT = 3, 2
INT4 = {"kind": "int", "bits": 4, "group_size": 8}
CELLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the pooled state of the first token; the last token's
    "bert, nf4": ("bert", NF4, {"kind": "lora", "r": 3, "alpha": 6, "dropout": 0.1}),
    "llama, int4": ("llama", INT4, {"kind": "qalora", "r": 3, "alpha": 6}),
}
"""Cell -> family, ``base.quant``, adapter."""

NEXT = {"single": "fsdp2", "fsdp2": "zero", "zero": "single", "fsdp2 on 2": "fsdp2 on 3"}
Job = tuple[dict[str, Any], int | None]
"""A configuration, and the step at which a signal comes."""


def make_tree(directory: Path, cell: str, engine: str, run: str) -> dict[str, Any]:
    family, quant, adapter = CELLS[cell]
    base = directory / family
    if not base.exists():
        save_classifier_base(base, family)
    changes = {"base__compute_dtype": "float32", "base__quant": quant, "train__eps": 1e-5}
    tree = domain_tree(directory, base, adapter=adapter, train__steps=STEPS, **changes)
    stage = {"stage": 2 if quant is INT4 else 3} if engine == "zero" else {}
    save = {"dir": str(directory / f"{family}-{run}"), "every": 0}
    return {**tree, "engine": {"kind": engine, **stage}, "save": save}


def work(world: World, jobs: list[Job]) -> list[int]:
    """Exit codes of runs, one after another: starting processes takes longer than a run."""
    return [train(world, tree, stop) for tree, stop in jobs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs: FAMILY-ENGINE, begun on that engine, and -whole."""
    directory = tmp_path_factory.mktemp("domains")

    def jobs(engine: str, begun: str, stop: int | None = None) -> list[Job]:
        return [(make_tree(directory, cell, engine, begun), stop) for cell in CELLS]

    done, cut = [0] * len(CELLS), [75] * len(CELLS)
    assert work(World(), [*jobs("single", "whole"), *jobs("single", "single", CUT)]) == done + cut
    todo = [*jobs("fsdp2", "single"), *jobs("fsdp2", "fsdp2", CUT)]
    assert run_ranks(work, 2, todo) == [done + cut] * 2
    for family, _, _ in CELLS.values():
        shutil.copytree(directory / f"{family}-fsdp2", directory / f"{family}-fsdp2 on 2")
    todo = [*jobs("fsdp2", "fsdp2 on 2"), *jobs("zero", "fsdp2"), *jobs("zero", "zero", CUT)]
    # what zero 3 does to its process stays there: it comes last
    todo.sort(key=lambda job: job[0]["engine"].get("stage", 0))
    for codes in run_ranks(work, 3, todo):
        assert sorted(codes) == done + done + cut
    assert work(World(), jobs("single", "zero")) == done
    close_log()
    return directory


def list_numbers(records: list[StepMetrics]) -> torch.Tensor:
    fields = [(r.loss, r.domain_loss, r.domain_accuracy, r.reversal_strength) for r in records]
    return torch.tensor(fields, dtype=torch.float64)


@pytest.mark.parametrize("run", NEXT)
@pytest.mark.parametrize("cell", CELLS)
def test_cell(runs: Path, cell: str, run: str) -> None:
    family, _, _ = CELLS[cell]
    whole, cut = runs / f"{family}-whole", runs / f"{family}-{run}"
    expected, found = (list_numbers(read_metrics(d / "metrics.jsonl")) for d in (whole, cut))
    print(f"{cell}, {run} then {NEXT[run]}:", found[:, 0].tolist())
    assert found.shape == (STEPS, 4) and len(set(found[:, 3].tolist())) == STEPS
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    adapters = [load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole, cut)]
    assert adapters[0].keys() == adapters[1].keys()
    assert not any("discriminator" in name for name in adapters[0])
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-2, atol=1e-4, msg=name)
