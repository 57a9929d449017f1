"""``gguf``: name and type of the file; its content is tested in ``test_gguf_file``."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats import gguf_format
from dist_peft.export.formats.registry import export_model
from dist_peft.export.time_limit import VerificationSkipped
from tests.support.export_runs import llama, make_run, mixture


def test_type_follows_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32), group=32)
    kept = export_model("gguf", run.job(tmp_path / "kept", pooled=True))
    assert kept.exact and kept.path == tmp_path / "kept" / "model-q4_1.gguf"
    merged = export_model("gguf", run.job(tmp_path / "merged"))
    assert not merged.exact and merged.how == "merged: Q8_0"
    half = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", into="decoded"))
    assert half.exact and half.path == tmp_path / "a.gguf"


def test_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, QuantConfig())
    monkeypatch.setattr(gguf_format, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dist_peft\[export\]"):
        export_model("gguf", run.job(tmp_path / "out"))


def config_of(family: str) -> tf.PretrainedConfig:
    sizes = {**llama().to_dict(), "pad_token_id": 1}
    known = ("model_type", "architectures", "dtype", "mlp_bias", "attention_bias")
    for key in (*known, "tie_word_embeddings", "hidden_act"):
        sizes.pop(key, None)
    scaled = {"query_pre_attn_scalar": 16, "sliding_window": 64}
    kinds = {
        "gemma": lambda: tf.GemmaConfig(**sizes),
        "gemma2": lambda: tf.Gemma2Config(**sizes, **scaled),
        "gemma3_text": lambda: tf.Gemma3TextConfig(
            **{**sizes, "rope_parameters": None, **scaled, "rope_theta": 10000.0}
        ),
        "phi3": lambda: tf.Phi3Config(**sizes),
    }
    return kinds[family]() if family in kinds else mixture(family)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_one_tensor_in_their_order(family: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=mixture(family))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", chunk_bytes=4 * 640))
    assert exported.written.packed == 2 * (4 + 3 * 4)
    tensors = {t.name: t for t in gguf.GGUFReader(exported.path).tensors}
    given = load_file(run.directory / "model.safetensors")
    names = {"gate": ("w1", "gate_proj"), "down": ("w2", "down_proj"), "up": ("w3", "up_proj")}
    for own, (mixtral, qwen) in names.items():
        found = torch.from_numpy(np.array(tensors[f"blk.1.ffn_{own}_exps.weight"].data))
        for expert in range(4):
            stem = f"model.layers.1.block_sparse_moe.experts.{expert}.{mixtral}"
            if family != "mixtral":
                stem = f"model.layers.1.mlp.experts.{expert}.{qwen}"
            assert torch.equal(found[expert], given[f"{stem}.weight"].half())
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    fields = gguf.GGUFReader(exported.path).fields
    name = fields["general.architecture"].contents()
    assert fields[f"{name}.expert_count"].contents() == 4
    assert fields[f"{name}.expert_used_count"].contents() == 2


def test_norms_of_gemma_hold_the_factor(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, config=config_of("gemma2"))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    tensors = {t.name: t for t in gguf.GGUFReader(exported.path).tensors}
    given = load_file(run.directory / "model.safetensors")
    for name, own in {
        "blk.1.post_attention_norm": "layers.1.post_attention_layernorm",
        "blk.0.ffn_norm": "layers.0.pre_feedforward_layernorm",
        "output_norm": "norm",
    }.items():
        found = torch.from_numpy(np.array(tensors[f"{name}.weight"].data))
        torch.testing.assert_close(found, given[f"model.{own}.weight"].float() + 1)
    fields = gguf.GGUFReader(exported.path).fields
    assert fields["gemma2.attn_logit_softcapping"].contents() == 50.0


REFUSED = {
    "norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": False}),
    "some layers of this model are dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "query_pre_attn_scalar 32": ("gemma2", {"query_pre_attn_scalar": 32}),
    "with silu, and this base has gelu": ("mixtral", {"hidden_act": "gelu"}),
    "full attention in every layer 2": ("gemma2", {"layer_types": ["full_attention"] * 2}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_llama_cpp_has_not(message: str, tmp_path: Path) -> None:
    family, changes = REFUSED[message]
    config = config_of(family)
    config.update(changes)
    run = make_run(tmp_path, None, config=config)
    with pytest.raises(UserError, match=message):
        export_model("gguf", run.job(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"]
)
def test_reader_computes_the_trained_logits(family: str, tmp_path: Path) -> None:
    """llama.cpp's server; Phi 3 is read by transformers."""
    run = make_run(tmp_path, None, config=config_of(family))
    exported = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16"))
    try:
        assert run.verify("gguf", exported)[1].relative < 0.01
    except VerificationSkipped as error:
        pytest.skip(str(error))
