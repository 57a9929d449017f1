"""Metadata, names and refusals of GGUF."""

from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.gguf_model import GgufModelLayout, RowTarget
from dist_peft.export.formats.registry import export_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.writer import TensorSpec
from tests.support.export_runs import make_run
from tests.support.gguf_configs import config_of_family
from tests.support.tiny_models import CONFIGS, save_model


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


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_names_and_row_order_of_families(family: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[family], tmp_path)
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path)), tmp_path)
    from dist_peft.export.base_weights import list_base_weights

    weights = {w.path: w for w in list_base_weights(skeleton)}
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    assert model.list_targets(query) == [RowTarget("blk.1.attn_q.weight")]
    rows = torch.arange(64).unsqueeze(1)
    ordered = model.reorder_rows(query, rows).flatten().tolist()
    assert (ordered[:4] == [0, 8, 1, 9]) == (family == "mistral")
    assert sorted(ordered) == list(range(64))
    if family == "qwen3":
        norm = weights["model.layers.0.self_attn.q_norm.weight"]
        assert model.list_targets(norm) == [RowTarget("blk.0.attn_q_norm.weight")]
        assert torch.equal(model.reorder_rows(norm, rows[:16, 0]), rows[:16, 0])


def weight_of(path: str, *shape: int) -> BaseWeight:
    return BaseWeight(TensorSpec(path, torch.float32, shape), path, None, path)


def test_tensors_that_the_text_model_has_not(tmp_path: Path) -> None:
    """Towers next to it, and layers that predict further tokens (DeepSeek V3, GLM 4.5)."""
    model = model_of(CONFIGS["qwen2"], tmp_path)
    for path in ("vision_model.patch.weight", "model.layers.2.eh_proj.weight"):
        assert model.list_targets(weight_of(path, 4, 4)) == []
    with pytest.raises(UserError, match=r"no name for tensor model\.layers\.1\.other"):
        model.list_targets(weight_of("model.layers.1.other.weight", 4, 4))


def test_targets_of_several_tensors(tmp_path: Path) -> None:
    layout = model_of(config_of_family("gpt_oss"), tmp_path / "gpt_oss")
    found = layout.list_targets(weight_of("model.layers.0.mlp.experts.gate_up_proj_bias", 4, 192))
    assert found == [
        RowTarget("blk.0.ffn_gate_exps.bias", slice(0, None, 2)),
        RowTarget("blk.0.ffn_up_exps.bias", slice(1, None, 2)),
    ]
    assert layout.list_targets(weight_of("model.layers.1.self_attn.sinks", 4)) == [
        RowTarget("blk.1.attn_sinks.weight")
    ]
    layout = model_of(config_of_family("granitemoeshared"), tmp_path / "granite")
    assert layout.list_targets(
        weight_of("model.layers.1.shared_mlp.input_linear.weight", 6, 4)
    ) == [
        RowTarget("blk.1.ffn_gate_shexp.weight", slice(3)),
        RowTarget("blk.1.ffn_up_shexp.weight", slice(3, None)),
    ]
    router = weight_of("model.layers.0.block_sparse_moe.router.weight", 4, 4)
    assert layout.list_targets(router) == [RowTarget("blk.0.ffn_gate_inp.weight")]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not for opt; merge the run"):
        model_of(CONFIGS["opt"], tmp_path / "opt")
