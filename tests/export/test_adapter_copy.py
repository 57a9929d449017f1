"""The adapter that goes with a base as training saw it."""

from pathlib import Path

import pytest
import torch

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import QuantConfig
from dist_peft.export.adapter_copy import write_adapter_copy
from tests.support.export_runs import make_run


def test_plain_adapter_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32))
    write_adapter_copy(run.adapter_dir, tmp_path / "out")
    found, wanted = (
        read_adapter_directory(tmp_path / "out" / "adapter"),
        read_adapter_directory(run.adapter_dir),
    )
    own = {"base_model_name_or_path": str(tmp_path / "out")}  # the base that lies there
    assert found.config == wanted.config | own
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize("rslora", [False, True])
def test_start_is_taken_away(tmp_path: Path, rslora: bool) -> None:
    """``[B, -B0] [A; A0]`` of rank 10 becomes ``B A`` of rank 5; an embedding keeps its rank."""
    A, B = torch.randn(10, 8), torch.randn(6, 10)
    prefix = "base_model.model.layer"
    tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    embedded = "base_model.model.embed_tokens"
    tensors[f"{embedded}.lora_embedding_A"] = torch.randn(3, 20)
    tensors[f"{embedded}.lora_embedding_B"] = torch.randn(8, 3)
    config = {
        "peft_type": "LORA",
        "r": 10,
        "lora_alpha": 7.0 * (2**0.5 if rslora else 2),
        "use_rslora": rslora,
        "rank_pattern": {"embed_tokens": 3},
        "alpha_pattern": {"embed_tokens": 4},
        "target_modules": ["layer", "embed_tokens"],
    }
    public = PublicAdapter(config, tensors, {"start": "pissa"})
    write_adapter_directory(tmp_path / "adapter", public, {})
    write_adapter_copy(tmp_path / "adapter", tmp_path / "out")
    found = read_adapter_directory(tmp_path / "out" / "adapter")
    assert torch.equal(found.tensors[f"{prefix}.lora_A.weight"], A[:5])
    assert torch.equal(found.tensors[f"{prefix}.lora_B.weight"], B[:, :5])
    assert found.config["r"] == 5 and found.config["lora_alpha"] == pytest.approx(7)
    assert found.config["rank_pattern"] == {"embed_tokens": 3}
    assert found.config["alpha_pattern"] == {"embed_tokens": 4}
    assert found.tensors[f"{embedded}.lora_embedding_A"].shape == (3, 20)
    assert not found.facts
