"""Skeletons and loading for every family: same logits, same buffers, as the model itself."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.model.attention_mask import build_model_inputs
from dist_peft.model.frozen_linear import FrozenLinear
from tests.support.loaded_models import IDS, load, logits
from tests.support.tiny_models import CONFIGS, save_model


@pytest.mark.parametrize("family", CONFIGS)
def test_same_logits_as_the_model_itself(family: str, tmp_path: Path) -> None:
    original = save_model(CONFIGS[family], tmp_path)
    skeleton = load(tmp_path)
    torch.testing.assert_close(
        logits(skeleton.model, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )
    buffers = dict(original.named_buffers())
    assert dict(skeleton.model.named_buffers()).keys() == buffers.keys()
    for name, buffer in skeleton.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert len(skeleton.blocks) == 2
    assert not any(p.requires_grad for p in skeleton.model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_documents_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    """Whatever isolates documents in a family, it does."""
    save_model(CONFIGS[family], tmp_path)
    model = load(tmp_path).model
    lengths = [9, 11, 4]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = logits(model, **build_model_inputs(model, IDS, positions))
    for part, ids in zip(packed.split(lengths, 1), IDS.split(lengths, 1), strict=True):
        torch.testing.assert_close(part, logits(model, input_ids=ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig(kind="int", bits=3, group_size=32)])
def test_quantized_linears_are_those_of_the_codec(
    family: str, quant: QuantConfig, tmp_path: Path
) -> None:
    """Linears inside the blocks are encoded; the rest keeps the file's values."""
    original = save_model(CONFIGS[family], tmp_path)
    skeleton = load(tmp_path, quant=quant)
    state = original.state_dict()
    linears = [m for m in skeleton.model.modules() if isinstance(m, FrozenLinear)]
    assert linears
    with torch.no_grad():
        for module in linears:
            weight = state[module.source]
            if not module.is_head:
                weight = module.codec.dequantize_rows(
                    module.codec.quantize_to_packed(weight), module.in_features, torch.float32
                )
            assert torch.equal(module.dequantize_weight(torch.float32), weight)
            original.get_parameter(module.source).copy_(weight)
    torch.testing.assert_close(
        logits(skeleton.model, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )


def test_sharded_checkpoint_and_bf16(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path, dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    skeleton = load(tmp_path, compute_dtype="float32")
    original = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(
        logits(skeleton.model, input_ids=IDS),
        logits(original, input_ids=IDS),
        rtol=0,
        atol=1e-6,
    )


def test_tied_embedding_is_one_parameter(tmp_path: Path) -> None:
    save_model(CONFIGS["qwen3"], tmp_path)
    skeleton = load(tmp_path)
    assert skeleton.tied
    model = skeleton.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_headless_names(tmp_path: Path) -> None:
    """Checkpoints saved from the model without head lack the leading ``model.``."""
    original = save_model(CONFIGS["qwen3"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stripped = {name.removeprefix("model."): t for name, t in tensors.items()}
    save_file(stripped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skeleton = load(tmp_path)
    torch.testing.assert_close(
        logits(skeleton.model, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )


class TestRefuses:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        save_model(CONFIGS["llama"], tmp_path)
        return tmp_path

    def edit(self, directory: Path, **changes: Any) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    def test_unknown_type(self, directory: Path) -> None:
        self.edit(directory, model_type="lama")
        with pytest.raises(UserError, match=r"config\.json.*lama"):
            load(directory)

    def test_no_config(self, directory: Path) -> None:
        (directory / "config.json").unlink()
        with pytest.raises(UserError, match=r"has no config\.json"):
            load(directory)

    def test_wrong_shape(self, directory: Path) -> None:
        self.edit(directory, hidden_size=128)
        with pytest.raises(UserError, match=r"has shape .* but config\.json asks for"):
            load(directory)

    def test_absent_tensor(self, directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"lacks 1 tensors .* such as model\.norm\.weight"):
            load(directory)

    def test_integer_weights(self, directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{name}.*not a floating-point type"):
            load(directory)

    def test_unknown_quantization(self, directory: Path) -> None:
        self.edit(directory, quantization_config={"quant_method": "aqlm"})
        with pytest.raises(UserError, match=r"'aqlm'.*the unquantized base"):
            load(directory)

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
        ).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="cannot build a causal LM of type 't5'"):
            load(tmp_path)

    def test_nan(self, directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight.*finite"):
            load(directory, quant=QuantConfig())

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": "abc"},
            {"num_attention_heads": 7, "head_dim": None},
            {"num_attention_heads": 0},
            {"hidden_act": "foo"},
            {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
            {"pad_token_id": 9999},
        ],
        ids=str,
    )
    def test_values_that_make_no_model(self, directory: Path, changes: dict[str, Any]) -> None:
        self.edit(directory, **changes)
        with pytest.raises(
            UserError,
            match=r"cannot use .*config\.json: .|cannot build a .+: .|json says num_\w+ 0",
        ):
            load(directory)

    @pytest.mark.parametrize("text", ["[]", "{", "", "3"])
    def test_config_that_is_no_object(self, directory: Path, text: str) -> None:
        (directory / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged: .+"):
            load(directory)

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere"):
            load(tmp_path / "nowhere")
        shutil.rmtree(tmp_path)


def test_layers_that_the_configuration_drops_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(CONFIGS["qwen3"], tmp_path)
    with caplog.at_level(logging.WARNING, "dist_peft"):
        load(tmp_path)
        assert caplog.text == ""
        config = json.loads((tmp_path / "config.json").read_text())
        config = {**config, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        load(tmp_path)
    assert "has 7 weights that a Qwen3ForCausalLM of this config.json does not use" in caplog.text
    assert "such as model.layers.1." in caplog.text


@pytest.mark.parametrize(("family", "learned"), [("llama", False), ("opt", True)])
def test_limits(family: str, learned: bool, tmp_path: Path) -> None:
    save_model(CONFIGS[family], tmp_path)
    skeleton = load(tmp_path)
    assert (skeleton.vocabulary_size, skeleton.max_positions) == (97, 64)
    assert skeleton.has_learned_positions == learned


def test_a_limit_below_zero_is_none(tmp_path: Path) -> None:
    """XLNet's positions are relative, and its configuration says -1."""
    config = tf.XLNetConfig(vocab_size=97, d_model=64, n_layer=2, n_head=4, d_inner=96)
    save_model(config, tmp_path)
    skeleton = load(tmp_path)
    assert skeleton.model_config.max_position_embeddings == -1
    assert skeleton.max_positions is None and not skeleton.has_learned_positions


def test_a_model_of_several_language_models_is_refused(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
    described = {name: {"model_type": kind} for name, kind in parts.items()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "musicgen", **described}))
    with pytest.raises(UserError, match=r"cannot use .*config.json: Multiple valid text configs"):
        load(tmp_path)
