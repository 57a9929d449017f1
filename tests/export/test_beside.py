"""The adapter that goes with a base as training saw it."""

from pathlib import Path

import torch

from dist_peft.adapters.base import PublicAdapter
from dist_peft.adapters.peft_format import read_adapter, write_adapter
from dist_peft.core.config import QuantConfig
from dist_peft.export.beside import write_adapter_beside
from tests.export.runs import make_run


def test_plain_adapter_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32))
    write_adapter_beside(run.adapter_dir, tmp_path / "out")
    found, wanted = read_adapter(tmp_path / "out" / "adapter"), read_adapter(run.adapter_dir)
    assert found.config == wanted.config and found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in found.tensors)


def test_start_is_taken_away(tmp_path: Path) -> None:
    """``[B, -B0] [A; A0]`` becomes ``B A``."""
    A, B = torch.randn(4, 8), torch.randn(6, 4)
    prefix = "base_model.model.layer"
    tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["layer"]}
    public = PublicAdapter(config, tensors, {"start": "pissa"})
    write_adapter(tmp_path / "adapter", public, {})
    write_adapter_beside(tmp_path / "adapter", tmp_path / "out")
    found = read_adapter(tmp_path / "out" / "adapter")
    product = found.tensors[f"{prefix}.lora_B.weight"] @ found.tensors[f"{prefix}.lora_A.weight"]
    torch.testing.assert_close(product, B[:, :2] @ A[:2])
    assert not found.facts
