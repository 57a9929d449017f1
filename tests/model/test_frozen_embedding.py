"""Packed embeddings and heads against plain ones of the dequantized weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.codec import Codec, make_codec
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, save_model

QUANTS = {
    "nf4": QuantConfig(embeddings=True),
    "int4": QuantConfig(kind="int", bits=4, group_size=16, embeddings=True),
}
HIDDEN = 37  # no whole number of groups


def make_codecs() -> dict[str, Codec]:
    return {name: make_codec(quant, torch.float32) for name, quant in QUANTS.items()}


def make_table() -> Tensor:
    return torch.randn(29, HIDDEN, generator=torch.Generator().manual_seed(0))


def pack(plain: nn.Embedding, codec: Codec) -> FrozenEmbedding:
    frozen = FrozenEmbedding(plain, codec, device="cpu")
    frozen.packed.data = codec.quantize_to_packed(make_table())
    plain.weight.data = codec.dequantize_rows(frozen.packed, HIDDEN, plain.weight.dtype)
    return frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_equals_an_embedding_of_the_dequantized_table(name: str, dtype: torch.dtype) -> None:
    plain = nn.Embedding(29, HIDDEN, padding_idx=3, dtype=dtype)
    frozen = pack(plain, make_codecs()[name])
    for ids in (torch.tensor([[0, 28, 3], [5, 5, 3]]), torch.tensor(7), torch.zeros(2, 0).long()):
        found = frozen(ids)
        assert found.dtype == dtype and torch.equal(found, plain(ids))
    for wrong in (29, -1):
        with pytest.raises(IndexError):
            frozen(torch.tensor([wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_family_that_scales_its_embeddings_keeps_its_code(dtype: torch.dtype) -> None:
    plain = Gemma3TextScaledWordEmbedding(29, HIDDEN, padding_idx=0, embed_scale=6.1).to(dtype)
    frozen = pack(plain, make_codecs()["nf4"])
    ids = torch.tensor([[0, 28, 3], [5, 5, 3]])
    assert torch.equal(frozen(ids), plain(ids)) and not torch.equal(frozen(ids), plain.weight[ids])
    assert float(torch.as_tensor(frozen.embed_scale)) == pytest.approx(6.1, rel=0.01)
    assert [name for name, _ in frozen.named_parameters()] == ["packed"]


def test_only_the_rows_of_the_ids_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codecs()["nf4"]
    frozen = pack(nn.Embedding(29, HIDDEN), codec)
    sizes: list[int] = []
    decode = type(codec).dequantize_rows

    def count(self: Codec, packed: Tensor, *args: Any) -> Tensor:
        sizes.append(len(packed))
        return decode(self, packed, *args)

    monkeypatch.setattr(type(codec), "dequantize_rows", count)
    frozen(torch.tensor([[4, 4, 1]]))
    assert sizes == [3]


def test_a_changing_table_is_no_frozen_one() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        FrozenEmbedding(nn.Embedding(4, 8, max_norm=1.0), make_codecs()["nf4"])


FAMILIES = ("llama", "qwen3", "gemma3", "gemma2", "opt", "phi")
"""Untied; tied; tied and scaled; the same with capped logits; positions; a head with a bias."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_equals_one_of_dequantized_ends(family: str, tmp_path: Path) -> None:
    quant = QUANTS["nf4" if family != "qwen3" else "int4"]
    save_model(CONFIGS[family], tmp_path / "base")
    skeleton = load(tmp_path / "base", quant=quant)
    model: Any = skeleton.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FrozenEmbedding) and isinstance(head, FrozenLinear)
    assert skeleton.tied == head.is_tied == (head.packed is embedding.packed)
    # the reference: the same base with the two weights rounded in its files
    files = load_file(tmp_path / "base" / "model.safetensors")
    for name in {embedding.source, head.source}:
        packed = embedding.codec.quantize_to_packed(files[name])
        files[name] = embedding.codec.dequantize_rows(packed, files[name].shape[1], torch.float32)
    rounded = tmp_path / "rounded"
    save_model(CONFIGS[family], rounded)
    save_file(files, rounded / "model.safetensors", {"format": "pt"})
    plain = load(rounded, quant=quant.model_copy(update={"embeddings": False})).model
    assert torch.equal(logits(model, input_ids=IDS), logits(plain, input_ids=IDS))


def test_tied_weights_are_loaded_once_whichever_name_the_file_has(tmp_path: Path) -> None:
    save_model(CONFIGS["qwen3"], tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    files["lm_head.weight"] = files.pop("model.embed_tokens.weight")
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    model: Any = load(tmp_path, quant=QUANTS["nf4"]).model
    head = model.get_output_embeddings()
    assert head.packed is model.get_input_embeddings().packed and head.source == "lm_head.weight"
    expected = head.codec.quantize_to_packed(files["lm_head.weight"])
    assert torch.equal(head.packed, expected)


def test_bytes_of_tied_ends_are_those_of_one_packed_copy(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        hidden_size=512,
        vocab_size=1000,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    save_model(config, tmp_path)
    sizes = {}
    for embeddings in (False, True):
        quant = QuantConfig(embeddings=embeddings)
        base = BaseConfig(path=str(tmp_path), quant=quant)
        model = build_skeleton(base, tmp_path).model
        sizes[embeddings] = sum(p.numel() * p.element_size() for p in model.parameters())
    row = make_codec(QuantConfig(), torch.bfloat16).num_row_bytes(512)
    assert sizes[False] - sizes[True] == 1000 * (2 * 512 - row)
