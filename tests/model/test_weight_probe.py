"""Families whose own code reads a linear's weight: it stays plain, the others train."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.single import SingleEngine
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.model.weight_probe import find_externally_read_linears, list_weights_read_by
from dist_peft.store.reader import RowReader
from tests.support.loaded_models import IDS
from tests.support.tiny_models import _GROUPED, save_model

CPU = torch.device("cpu")
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES: dict[str, tuple[tf.PretrainedConfig, str]] = {
    "mamba": (
        tf.MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=8),
        "mixer",
    ),
    "mamba2": (
        tf.Mamba2Config(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=2,
            head_dim=16,
            num_heads=8,
            state_size=16,
            n_groups=1,
            chunk_size=16,
        ),
        "mixer.out_proj",
    ),
    "granitemoehybrid": (
        tf.GraniteMoeHybridConfig(
            **_GROUPED,
            **_MAMBA2,
            layer_types=["mamba", "attention"],
            num_local_experts=0,
            shared_intermediate_size=96,
        ),
        "mamba.out_proj",
    ),
}


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.c.weight.data.zero_()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x.to(self.a.weight.dtype)) + self.inner[0](self.c(x))


def test_what_code_reads() -> None:
    module = _Reader()

    class Local(_Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.inner.first.bias.sum()

    assert list_weights_read_by(_Reader) == {"a"}
    assert list_weights_read_by(Local) == {"a", "inner.first"}
    assert find_externally_read_linears(nn.Sequential(module)) == {id(module.a)}


@pytest.mark.parametrize("family", FAMILIES)
def test_trains(family: str, tmp_path: Path) -> None:
    """One backward with LoRA on all linears that are packed; every factor gets a gradient."""
    config, kept = FAMILIES[family]
    save_model(config, tmp_path)
    base = BaseConfig(path=str(tmp_path), quant=QuantConfig(), compute_dtype="float32")
    skeleton = build_skeleton(base, tmp_path)
    model = skeleton.model
    plain = [n for n, m in model.named_modules() if type(m) is nn.Linear and kept in n]
    assert plain
    assert any(isinstance(m, FrozenLinear) and not m.is_head for m in model.modules())
    LoraAdapter(LoraConfig(), seed=0, arithmetic=torch.float32).attach_to_model(model)
    engine = SingleEngine(CPU)
    engine.shard_model(model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(model, reader, engine, CPU)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    factors = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert factors
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())


REFUSED: dict[str, tuple[tf.PretrainedConfig, str]] = {
    "rwkv": (
        tf.RwkvConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, context_length=64),
        "divides weights",
    ),
    "zamba2": (
        tf.Zamba2Config(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=104,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            mamba_d_state=16,
            n_mamba_heads=8,
            mamba_ngroups=1,
            num_mem_blocks=1,
        ),
        "its layers share weights",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_cause(family: str, tmp_path: Path) -> None:
    config, cause = REFUSED[family]
    save_model(config, tmp_path)
    base = BaseConfig(path=str(tmp_path), quant=QuantConfig(), compute_dtype="float32")
    with pytest.raises(UserError, match=f"{family}.*not supported: .*{cause}"):
        build_skeleton(base, tmp_path)
