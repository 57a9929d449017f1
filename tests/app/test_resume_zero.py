"""Checkpoints move between engines: DeepSpeed ZeRO to and from the others, at other ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.world import World
from tests.support.dist import run_ranks
from tests.support.story_runs import STEPS, STOP, losses, short, train

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = [pytest.mark.dist, pytest.mark.data]


def zero(stage: int) -> dict[str, Any]:
    return {"kind": "zero", "stage": stage}


CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], int, dict[str, Any]]] = {
    "fsdp2 on 2 -> zero 2 on 3": ({"kind": "fsdp2"}, 2, zero(2), 3, {"adapter__init": "pissa"}),
    "zero 1 on 3 -> zero 3 on 2": (zero(1), 3, zero(3), 2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_another_engine(shared_data: Path, tmp_path: Path, case: str) -> None:
    """The losses after are the uninterrupted run's, and the adapter written is whole."""
    first, ranks, second, other_ranks, changes = CASES[case]
    whole = short(shared_data, tmp_path, "whole", **changes)
    assert train(World(), whole) == 0
    cut = short(shared_data, tmp_path, "cut", engine=first, **changes)
    assert run_ranks(train, ranks, cut, STOP) == [75] * ranks
    assert run_ranks(train, other_ranks, {**cut, "engine": second}) == [0] * other_ranks
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=0)
    adapters = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for key, want in adapters[0].items():
        assert adapters[1][key].numel() and adapters[1][key].shape == want.shape
        torch.testing.assert_close(adapters[1][key], want, rtol=1e-2, atol=1e-4, msg=key)
