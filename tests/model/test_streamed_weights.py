"""Forward passes whose weights are read from the files while they run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from dist_peft.core.config.run import BaseConfig
from dist_peft.model import streamed_weights
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.model.streamed_weights import stream_weights
from dist_peft.store.reader import RowReader
from tests.support.tiny_models import CONFIGS, CONVOLUTIONS, MIXTURES, save_model

IDS = torch.tensor([[1, 5, 9, 80, 33, 2, 41], [3, 3, 96, 0, 7, 8, 9]])
FAMILIES = {
    # tied and untied heads, biases, scaled embeddings, capped logits, positions looked up at an
    # offset, stacks of experts, a shared expert, convolutions
    name: {**CONFIGS, **MIXTURES, **CONVOLUTIONS}[name]
    for name in ("llama-tied-bias", "gemma2", "gemma3", "opt", "qwen2_moe", "falcon_h1")
}


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of ten rows: every matrix is larger than one."""
    monkeypatch.setattr(streamed_weights, "PANEL_BYTES", 4 * 64 * 10)


def build(directory: Path, **settings: Any) -> Skeleton:
    settings = {"quant": None, "compute_dtype": "float32", **settings}
    return build_skeleton(BaseConfig(path=str(directory), **settings), directory)


def run(skeleton: Skeleton) -> tuple[torch.Tensor, RowReader]:
    with (
        torch.no_grad(),
        RowReader(skeleton.index) as reader,
        stream_weights(skeleton.model, skeleton.blocks, reader),
    ):
        return skeleton.model(input_ids=IDS, use_cache=False).logits, reader


def test_tied_head_that_is_smaller_than_a_panel(tmp_path: Path) -> None:
    """It is read whole, by the name of the embedding."""
    model = save_model(FAMILIES["llama-tied-bias"], tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
    skeleton = build(tmp_path)
    assert skeleton.tied
    torch.testing.assert_close(run(skeleton)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    model = save_model(FAMILIES[family], tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
    skeleton = build(tmp_path)
    found, reader = run(skeleton)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for p in skeleton.model.parameters())  # dropped again
    sizes = [info.num_bytes for info in skeleton.index.tensors.values()]
    assert reader.largest_read < max(sizes)
    if family not in MIXTURES and not skeleton.tied:
        # the embedding's rows that no id names are not read; every other byte is, once
        embedding = skeleton.model.get_input_embeddings().weight
        rows = len(IDS.unique()) / embedding.shape[0]
        unread = (1 - rows) * embedding.numel() * 4
        assert reader.bytes_read == pytest.approx(sum(sizes) - unread, rel=0.05)


def test_experts_without_tokens_are_not_read(tmp_path: Path) -> None:
    config = tf.MixtralConfig(**{**MIXTURES["mixtral"].to_dict(), "num_local_experts": 64})
    save_model(config, tmp_path)
    skeleton = build(tmp_path)
    _, reader = run(skeleton)
    assert reader.bytes_read < 0.7 * sum(i.num_bytes for i in skeleton.index.tensors.values())


class _Reading(nn.Module):
    """Uses its matrix in each way that is answered without reading the whole, and in one more."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 64, padding_idx=50)

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        weight = self.embedding.weight
        assert weight.device.type == "cpu" and weight.shape == weight.size() == (97, 64)
        assert weight.dtype == torch.float32 and weight.dim() == 2 and weight.numel() == 97 * 64
        x = self.embedding(ids)
        return [
            x,
            nn.functional.linear(x, weight),
            nn.functional.linear(x, weight, torch.ones(97)),
            nn.functional.embedding(input=ids, weight=weight),
            x @ weight.T,
            weight.sum(),
            nn.functional.embedding(ids, weight, max_norm=0.1),
        ]


@pytest.mark.usefixtures("small_panels")
def test_every_use_of_a_matrix(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    index = build(tmp_path).index
    source = "model.embed_tokens.weight"
    with RowReader(index) as reader, torch.no_grad():
        loaded, streamed = _Reading(), _Reading()
        loaded.embedding.weight.copy_(reader.read_rows(source))
        streamed.embedding.weight = nn.Parameter(loaded.embedding.weight.to("meta"), False)
        streamed.embedding.checkpoint_names = {"weight": source}  # type: ignore[assignment]
        wanted = loaded(IDS)
        with stream_weights(streamed, [], reader):
            found = streamed(IDS)
        assert streamed.embedding.weight.is_meta
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_quantized_base_is_not_decoded_from_its_plain_rows(tmp_path: Path) -> None:
    """NF4 of ``base.quant``: rows are encoded as for training."""
    save_model(CONFIGS["llama"], tmp_path)
    exact, _ = run(build(tmp_path))
    rounded, _ = run(build(tmp_path, quant={"kind": "nf4"}))
    assert 0 < (exact - rounded).abs().mean() < 0.5 * exact.abs().mean()
