"""Masks of packed documents, and the look at the logits that trusts no mask."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.model import attention_mask as attention
from dist_peft.model.attention_mask import (
    build_document_mask,
    build_model_inputs,
    build_prefix_mask,
    documents_are_isolated,
)
from tests.support.tiny_models import CONFIGS, CONVOLUTIONS, MIXTURES, save_model

CPU = torch.device("cpu")


def model_of(family: str, directory: Path) -> tf.PreTrainedModel:
    save_model(CONFIGS[family], directory)
    return tf.AutoModelForCausalLM.from_pretrained(directory)


def sees_by_loop(lengths: list[int]) -> list[list[bool]]:
    """By walking over the documents: a token sees itself and what came before in its own."""
    size, start = sum(lengths), 0
    sees = [[False] * size for _ in range(size)]
    for length in lengths:
        for place in range(start, start + length):
            for earlier in range(start, place + 1):
                sees[place][earlier] = True
        start += length
    return sees


@st.composite
def rows_of_documents(draw: st.DrawFn) -> list[list[int]]:
    """One to three rows of 12 tokens, each cut into documents of at least one token."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left, lengths = 12, []
        while left:
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        rows.append(lengths)
    return rows


@given(rows_of_documents(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_document_mask_is_what_a_loop_says(rows: list[list[int]], dtype: torch.dtype) -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    mask = build_document_mask(positions, dtype)
    assert mask.dtype == dtype and mask.shape == (len(rows), 1, 12, 12)
    for row, lengths in zip(mask[:, 0], rows, strict=True):
        sees = torch.tensor(sees_by_loop(lengths))
        expected = torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)
        assert torch.equal(row, expected)


class TestPrefixMask:
    ROWS = ([5, 7], [9, 2, 1])

    @pytest.mark.parametrize("window", [None, 4])
    def test_is_what_a_loop_says(self, window: int | None) -> None:
        """With a prefix of 3: it is seen by all, within the window, and right before each."""
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in self.ROWS])
        config = tf.MistralConfig(sliding_window=window)
        mask = build_prefix_mask(config, positions, 3, torch.float32)
        assert isinstance(mask, torch.Tensor) and mask.shape == (2, 1, 12, 15)
        for row, own, lengths in zip(mask[:, 0], positions.tolist(), self.ROWS, strict=True):
            inside = sees_by_loop(lengths)
            for q in range(12):
                for k in range(15):
                    distance = own[q] - (own[k - 3] if k >= 3 else k - 3)
                    sees = (k < 3 or inside[q][k - 3]) and (window is None or distance < window)
                    assert (row[q, k] == 0) == sees, (q, k)

    def test_one_for_each_type_of_layer(self) -> None:
        positions = torch.tensor([[0, 1, 0, 1]])
        masks = build_prefix_mask(CONFIGS["gemma2"], positions, 2, torch.float32)
        assert isinstance(masks, dict)
        assert set(masks) == {"full_attention", "sliding_attention"}
        assert set(build_prefix_mask(CONFIGS["qwen3"], positions, 2, torch.float32)) == {
            "full_attention"
        }


class TestIsolation:
    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_holds(self, family: str, tmp_path: Path) -> None:
        assert documents_are_isolated(model_of(family, tmp_path), CPU)

    def test_is_missed_where_a_model_ignores_positions(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of("opt", tmp_path)
        monkeypatch.setattr(attention, "_NEED_EXPLICIT_MASK", set())
        assert not documents_are_isolated(model, CPU)

    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_holds_in_half_precision(self, family: str) -> None:
        torch.manual_seed(0)
        config = {**CONFIGS, **MIXTURES}[family]
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        assert documents_are_isolated(model, CPU)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("family", CONVOLUTIONS)
    def test_convolutions_let_through(self, family: str, dtype: torch.dtype) -> None:
        """Random weights as small as initialized: the leak is, too."""
        torch.manual_seed(0)
        config = CONVOLUTIONS[family]
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        assert not documents_are_isolated(model, CPU)


@pytest.mark.parametrize(
    ("family", "positions", "explicit"),
    [
        ("opt", [[0, 1, 0, 1]], True),
        ("opt", [[0, 1, 2, 3]], False),
        ("llama", [[0, 1, 0, 1]], False),
    ],
    ids=["opt packed", "opt one document", "llama packed"],
)
def test_mask_is_explicit_only_where_needed(
    family: str, positions: list[list[int]], explicit: bool, tmp_path: Path
) -> None:
    model = model_of(family, tmp_path)
    place = torch.tensor(positions)
    inputs = build_model_inputs(model, torch.tensor([[5, 6, 7, 8]]), place)
    assert ("attention_mask" in inputs) == explicit
    assert inputs["position_ids"] is place
    if explicit:
        assert torch.equal(inputs["attention_mask"], build_document_mask(place, torch.float32))


def test_type_that_saving_has_made_a_name(tmp_path: Path) -> None:
    """``save_pretrained`` of a live model leaves ``config.dtype`` as text."""
    model = model_of("opt", tmp_path)
    place = torch.tensor([[0, 1, 0, 1]])
    model.config.dtype = "bfloat16"
    mask = build_model_inputs(model, torch.tensor([[5, 6, 7, 8]]), place)["attention_mask"]
    assert torch.equal(mask, build_document_mask(place, torch.bfloat16))
