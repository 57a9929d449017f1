"""Metadata, names and refusals of GGUF."""

from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_model import GgufModelLayout
from dist_peft.export.formats.registry import export_model
from dist_peft.model.skeleton import build_skeleton
from tests.support.export_runs import llama, make_run
from tests.support.tiny_models import CONFIGS, save_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def model_of(config: tf.PretrainedConfig, directory: Path) -> GgufModelLayout:
    save_model(config, directory)
    return GgufModelLayout(build_skeleton(BaseConfig(path=str(directory)), directory))


def test_metadata(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        QuantConfig(),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    )
    export_model("gguf", run.job(tmp_path / "a.gguf"))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama",
        "general.name": "base",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    assert {name: fields.get(name) for name in wanted} == wanted
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    config = llama(rope_parameters=LLAMA3)
    found = model_of(config, tmp_path).compute_rope_factors()
    assert found is not None
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    torch.testing.assert_close(plain / found, scaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_names_and_row_order_of_families(family: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[family], tmp_path)
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path)), tmp_path)
    from dist_peft.export.base_weights import list_base_weights

    weights = {w.path: w for w in list_base_weights(skeleton)}
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    assert model.map_tensor_name(query) == "blk.1.attn_q.weight"
    rows = torch.arange(64).unsqueeze(1)
    ordered = model.reorder_rows(query, rows).flatten().tolist()
    assert (ordered[:4] == [0, 8, 1, 9]) == (family == "mistral")
    assert sorted(ordered) == list(range(64))
    if family == "qwen3":
        norm = weights["model.layers.0.self_attn.q_norm.weight"]
        assert model.map_tensor_name(norm) == "blk.0.attn_q_norm.weight"
        assert torch.equal(model.reorder_rows(norm, rows[:16, 0]), rows[:16, 0])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not for phi; merge the run"):
        model_of(CONFIGS["phi"], tmp_path / "phi")
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="rotary scaling 'yarn'"):
        model_of(llama(rope_parameters=yarn), tmp_path / "yarn")
