"""Which linears are packed, and a base of which nothing is."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.model.freezing import compute_packed_share, is_plain_linear
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, save_model


class _Same(nn.Linear):
    pass


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, super().forward(x)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.Linear, True), (FalconLinear, True), (_Same, True), (_Scaled, False), (_Pair, False)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_plain_linear(kind: type[nn.Linear], plain: bool, bias: bool) -> None:
    module = kind(8, 4, bias=bias, device="meta")
    assert is_plain_linear(module) == plain
    assert module.weight.shape == (4, 8)
    assert not is_plain_linear(nn.Embedding(3, 4))


def test_falcon_is_packed(tmp_path: Path) -> None:
    config = tf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1
    )
    original = save_model(config, tmp_path)
    plain = load(tmp_path).model
    torch.testing.assert_close(
        logits(plain, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )
    packed = load(tmp_path, quant=QuantConfig()).model
    assert 0.5 < compute_packed_share(packed) < 1
    assert compute_packed_share(plain) == 0


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    config = tf.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    save_model(config, tmp_path)
    with pytest.raises(UserError, match=r"base\.quant packs nothing of .*of class Conv1D"):
        load(tmp_path, quant=QuantConfig())
    load(tmp_path)  # unquantized it is a base like others


def test_share_by_hand(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    model = load(tmp_path, quant=QuantConfig(kind="int", bits=4, group_size=32)).model
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    inside = sum(size for n, size in sizes.items() if n.endswith("packed") and "layers" in n)
    assert compute_packed_share(model) == pytest.approx(inside / sum(sizes.values()))
    assert torch.is_grad_enabled()
