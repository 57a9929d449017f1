"""Attention within documents, compared with masks and with each document alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist_peft.core.config.run import BaseConfig
from dist_peft.model import document_attention
from dist_peft.model.document_attention import (
    DOCUMENT_ATTENTION,
    build_document_boundaries,
    build_document_masks,
    document_attention_forward,
    select_document_attention,
)
from dist_peft.model.skeleton import build_skeleton
from tests.support.tiny_models import _COMMON, _GROUPED, CONFIGS, MIXTURES, save_model

_USED = [name for name in {**CONFIGS, **MIXTURES} if name != "gemma2"]
"""Gemma 2 caps scores, which only its eager attention does."""


def make_positions(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def attend_with_mask(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """A slow reference: whole scores in float64, masked."""
    document = (positions == 0).cumsum(1)
    sees = (document[:, :, None] == document[:, None, :]) & torch.ones(
        positions.shape[1], positions.shape[1], dtype=torch.bool
    ).tril()
    groups = query.shape[1] // key.shape[1]
    wide_key = key.double().repeat_interleave(groups, 1)
    wide_value = value.double().repeat_interleave(groups, 1)
    scores = query.double() @ wide_key.transpose(2, 3) * 0.3
    weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(3)
    return (weights @ wide_value).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_outputs_and_gradients_equal_those_of_a_mask(
    lengths: list[int], groups: int, half: bool
) -> None:
    positions = make_positions(lengths, lengths[::-1])
    size = sum(lengths)
    dtype = torch.bfloat16 if half else torch.float32
    torch.manual_seed(size)
    query, key, value = (
        torch.randn(2, heads, size, width).to(dtype).requires_grad_()
        for heads, width in ((2 * groups, 8), (2, 8), (2, 6))
    )
    boundaries = build_document_boundaries(positions)
    found, weights = document_attention_forward(
        nn.Module(), query, key, value, boundaries, scaling=0.3
    )
    expected = attend_with_mask(query, key, value, positions)
    assert weights is None and found.dtype == dtype and found.is_contiguous()
    allowed = 2e-2 if half else 1e-5
    assert torch.allclose(found.double(), expected, atol=allowed)
    direction = torch.randn(found.shape, dtype=torch.float64)
    inputs = (query, key, value)
    ours = torch.autograd.grad((found.double() * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=5 * allowed)


def test_boundaries_are_places_of_documents_in_the_flattened_batch() -> None:
    positions = make_positions([3, 2], [1, 4])
    assert build_document_boundaries(positions).tolist() == [[[[0, 3, 5, 6, 10]]]]
    assert build_document_boundaries(positions, is_packed=False).tolist() == [[[[0, 5, 10]]]]


@pytest.mark.parametrize("family", _USED)
def test_a_packed_row_has_the_logits_of_its_documents_alone(family: str) -> None:
    torch.manual_seed(0)
    config = {**CONFIGS, **MIXTURES}[family]
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows = [5, 7, 3, 9], [9, 11, 2, 2]  # longer and shorter than the windows of 8
    positions = make_positions(*rows)
    ids = torch.randint(3, 90, positions.shape)
    documents = [
        (row, sum(lengths[:n]), length)
        for row, lengths in enumerate(rows)
        for n, length in enumerate(lengths)
    ]
    with torch.no_grad():
        alone = [
            model(input_ids=ids[row : row + 1, first : first + length], use_cache=False).logits[0]
            for row, first, length in documents
        ]
        assert select_document_attention(model)
        assert model.config._attn_implementation == DOCUMENT_ATTENTION
        mask = build_document_masks(model, positions, is_packed=True)
        packed = model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
    for (row, first, length), logits in zip(documents, alone, strict=True):
        assert torch.allclose(packed[row, first : first + length], logits, atol=2e-6)


def test_padding_alone_does_not_make_a_row_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    product = nn.functional.scaled_dot_product_attention

    def count_calls(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(query.shape))
        assert kwargs.get("attn_mask") is None and kwargs["is_causal"]
        return product(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count_calls)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32).eval()
    select_document_attention(model)
    positions = make_positions([6, 2], [8], [3, 5])  # the last 2 and 5 are padding
    ids = torch.randint(3, 90, positions.shape)
    mask = build_document_masks(model, positions, is_packed=False)
    model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    assert calls == [(3, 4, 8, 16)] * 2  # one product a layer


def test_no_mask_of_all_pairs_is_made() -> None:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    select_document_attention(model)
    masks = build_document_masks(model, make_positions([30_000, 2_768]), is_packed=True)
    assert isinstance(masks, dict)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "full_attention": (1, 1, 1, 3),
        "sliding_attention": (1, 1, 1, 3),
    }


@pytest.mark.parametrize("tokens", [30, 70])
def test_a_class_that_fsdp2_made_has_the_masks_of_its_model(tokens: int) -> None:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    model.config.sliding_window = 50
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert select_document_attention(model)
    positions = make_positions([tokens, 5])
    expected = build_document_masks(model, positions, is_packed=True)
    module = "torch.distributed.fsdp._fully_shard._fully_shard"
    model.__class__ = type("FSDPQwen3", (FSDPModule, type(model)), {"__module__": module})
    masks = build_document_masks(model, positions, is_packed=True)
    assert isinstance(masks, dict) and isinstance(expected, dict)
    assert {n: mask.shape for n, mask in masks.items()} == {n: m.shape for n, m in expected.items()}
    assert (masks["sliding_attention"].dtype == torch.bool) == (tokens > 50)


@pytest.mark.parametrize(
    ("family", "attention"), [("gemma2", "eager"), ("llama", "eager"), ("opt", "eager")]
)
def test_other_attention_is_left_as_it_is(family: str, attention: str) -> None:
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention)
    assert not select_document_attention(model)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["doge", "llama"])
def test_code_that_makes_another_use_of_the_mask_is_found(family: str, tmp_path: Path) -> None:
    """Doge adds its own mask to the one it is given."""
    config = tf.DogeConfig(**_GROUPED) if family == "doge" else CONFIGS[family]
    save_model(config, tmp_path)
    base = BaseConfig(path=str(tmp_path), quant=None, compute_dtype="float32")
    model = build_skeleton(base, tmp_path).model
    used = model.config._attn_implementation == DOCUMENT_ATTENTION
    assert used == (family != "doge")


def test_attention_in_both_directions_is_left_as_it_is() -> None:
    model = tf.BertLMHeadModel(tf.BertConfig(**_COMMON))
    assert not select_document_attention(model)


def test_families_with_layers_of_other_kinds_are_left_as_they_are() -> None:
    small = {"hidden_size": 64, "intermediate_size": 104, "num_attention_heads": 4}
    config = tf.Lfm2Config(
        **small, num_hidden_layers=2, vocab_size=97, layer_types=["conv", "full_attention"]
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    assert not select_document_attention(model)


def test_a_variable_length_kernel_gets_flattened_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call that CUDA makes, with a stand-in that computes it by loops."""
    import torch.nn.attention.varlen as varlen

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert window_size == (-1, 0) and enable_gqa and cu_seq_q.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == 9
        cuts = cu_seq_q.tolist()
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (query, key, value)),
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for a, b in pairwise(cuts)
        ]
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    positions = make_positions([4, 5], [2, 7])
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    boundaries = build_document_boundaries(positions).flatten()
    found = document_attention._attend_varlen(query, key, value, boundaries, 0.3)
    expected = attend_with_mask(query, key, value, positions)
    assert torch.allclose(found.double(), expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_documents_have_the_outputs_of_a_mask(dtype: torch.dtype) -> None:
    positions = make_positions([300, 41, 171], [512])
    query, key, value = (
        torch.randn(2, heads, 512, 64, dtype=dtype, device="cuda") for heads in (8, 2, 2)
    )
    boundaries = build_document_boundaries(positions).cuda()
    found, _ = document_attention_forward(nn.Module(), query, key, value, boundaries, scaling=0.3)
    expected = attend_with_mask(query.cpu(), key.cpu(), value.cpu(), positions)
    assert torch.allclose(found.cpu().double(), expected, atol=3e-2)
