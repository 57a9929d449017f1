"""Losses computed in the head, compared with those of whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.codec import Codec, RawCodec, make_codec
from dist_peft.train import head_loss
from dist_peft.train.head_loss import (
    compute_frozen_head_losses,
    computes_losses_at_head,
    replace_logits_by_losses,
)
from dist_peft.train.loss import IGNORE, sum_token_loss
from tests.support.tiny_models import CONFIGS, save_model

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "pad_token_id": 0,
}


def make_head(kind: str, dtype: torch.dtype, vocabulary: int, hidden: int) -> nn.Module:
    torch.manual_seed(1)
    weight = torch.randn(vocabulary, hidden).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    if kind == "tied":
        plain = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        plain.weight.data = weight
        return plain
    codec: Codec = make_codec(QuantConfig(), dtype) if kind == "panels" else RawCodec(dtype)
    has_bias = kind in ("bias", "panels")
    head = FrozenLinear(hidden, vocabulary, codec, has_bias, dtype, "head", "cpu")
    head.packed.data = codec.quantize_to_packed(weight)
    if head.bias is not None:
        head.bias.data = bias
    return head


def pick_targets(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    places = labels != IGNORE
    return x[places], labels[places]


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("kind", ["frozen", "bias", "tied", "panels"])
@pytest.mark.parametrize("chunks", [1, 5])
def test_losses_and_gradients_equal_those_of_whole_logits(
    kind: str, dtype: torch.dtype, allowed: float, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, hidden = 103, 37  # H odd: packed rows have padding
    head = make_head(kind, dtype, vocabulary, hidden)
    monkeypatch.setitem(head_loss._CHUNK_ELEMENTS, "cpu", vocabulary * 32 // chunks)
    monkeypatch.setattr(head_loss, "_CACHED_ELEMENTS", vocabulary * 4 // chunks)  # 4 rows or none
    monkeypatch.setattr(head_loss, "_WEIGHT_ELEMENTS", 700)  # blocks of 18 rows, 13 in the last
    monkeypatch.setattr(head_loss, "WHOLE_ELEMENTS", vocabulary * hidden - 1)
    monkeypatch.setitem(head_loss._PANEL_ELEMENTS, "cpu", 500)  # panels of 13 rows, 12 in the last
    x = torch.randn(2, 17, hidden).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, 17))
    labels[0, :3] = labels[1, 5:9] = IGNORE
    expected = sum_token_loss(head(x), labels) / 7
    (gradient,) = torch.autograd.grad(expected, x)
    found = compute_frozen_head_losses(*pick_targets(x, labels), head).sum() / 7
    (found_gradient,) = torch.autograd.grad(found, x)
    assert abs((found - expected).item()) <= 1e-6 * expected.item()
    scale = float(gradient.abs().max())
    assert float((found_gradient - gradient).abs().max()) <= allowed * scale
    assert not found_gradient[labels == IGNORE].any()


def test_a_large_quantized_head_is_never_dequantized_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = make_head("panels", torch.float32, 103, 37)
    sizes: list[int] = []
    decode = type(head.codec).dequantize_rows

    def count(self: Codec, packed: Tensor, *args: Any) -> Tensor:
        sizes.append(len(packed))
        return decode(self, packed, *args)

    monkeypatch.setattr(type(head.codec), "dequantize_rows", count)
    x, targets = torch.randn(6, 37, requires_grad=True), torch.arange(6)
    compute_frozen_head_losses(x, targets, head)
    assert sizes == [103]  # a small one is, once
    monkeypatch.setattr(head_loss, "WHOLE_ELEMENTS", 1)
    monkeypatch.setitem(head_loss._PANEL_ELEMENTS, "cpu", 37 * 40)
    sizes.clear()
    compute_frozen_head_losses(x, targets, head).sum().backward()
    assert sizes == [40, 40, 23] * 2  # logits, gradient


def test_each_loss_has_its_own_gradient_scale() -> None:
    head = make_head("frozen", torch.float32, 31, 8)
    x = torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([0, 30, 7, 7, 2])
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    (found,) = torch.autograd.grad(
        (compute_frozen_head_losses(x, targets, head) * weights).sum(), x
    )
    plain = nn.functional.cross_entropy(head(x), targets, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_batch_without_targets_has_no_loss_and_a_zero_gradient() -> None:
    head = make_head("frozen", torch.float32, 31, 8)
    x = torch.randn(1, 4, 8, requires_grad=True)
    labels = torch.full((1, 4), IGNORE)
    losses = compute_frozen_head_losses(*pick_targets(x, labels), head)
    assert losses.shape == (0,)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert not gradient.any()


def load_tiny_model(config: tf.PretrainedConfig, directory: Path) -> nn.Module:
    """A model with frozen linears, filled with random numbers."""
    save_model(config, directory)
    base = BaseConfig(path=str(directory), quant=None, compute_dtype="float32")
    model = build_skeleton(base, directory).model
    torch.manual_seed(0)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if p.dtype == torch.uint8:
                assert isinstance(module, FrozenLinear)
                rows = torch.randn(p.shape[0], module.in_features) * 0.2
                value = module.codec.quantize_to_packed(rows)
            else:
                value = torch.randn(p.shape, dtype=p.dtype) * 0.2
            module._parameters[name] = nn.Parameter(value, False)
        for name, b in list(module._buffers.items()):
            if b is not None and b.is_meta:
                raise AssertionError(name)
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma3", "phi", "gpt_neox", "opt"])
def test_a_model_returns_losses_in_place_of_logits(family: str, tmp_path: Path) -> None:
    model = load_tiny_model(CONFIGS[family], tmp_path)
    assert computes_losses_at_head(model)
    ids = torch.randint(3, 97, (2, 9))
    labels = ids.roll(-1, 1)
    labels[0, :4] = labels[:, -1] = IGNORE
    logits = model(input_ids=ids, use_cache=False).logits
    with replace_logits_by_losses(model, labels):
        losses = model(input_ids=ids, use_cache=False).logits
    expected = nn.functional.cross_entropy(*pick_targets(logits, labels), reduction="none")
    assert losses.shape == expected.shape == (12,)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)  # as before


def test_the_head_is_as_before_after_an_error(tmp_path: Path) -> None:
    model = load_tiny_model(CONFIGS["llama"], tmp_path)
    before = dict(vars(model.get_output_embeddings()))
    with (
        pytest.raises(ZeroDivisionError),
        replace_logits_by_losses(model, torch.zeros(1, 1).long()),
    ):
        raise ZeroDivisionError
    assert vars(model.get_output_embeddings()) == before


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["gemma2"],  # caps its logits
        tf.CohereConfig(**_SMALL),  # scales them
        tf.GraniteConfig(**_SMALL, logits_scaling=2.0),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_families_that_change_logits_after_the_head_are_told_apart(
    config: tf.PretrainedConfig, tmp_path: Path
) -> None:
    assert not computes_losses_at_head(load_tiny_model(config, tmp_path))


def test_a_trainable_head_uses_whole_logits(tmp_path: Path) -> None:
    model = load_tiny_model(CONFIGS["llama-tied-bias"], tmp_path)
    model.get_output_embeddings().requires_grad_(True)
    assert not computes_losses_at_head(model)
