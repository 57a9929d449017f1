import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.adapters.bottleneck.format import (
    ModelDescription,
    is_adapterhub_config,
    parse_bottleneck_config,
    parse_bottleneck_tensors,
    to_public_bottleneck,
)
from dist_peft.adapters.directory import (
    check_public_adapter,
    open_adapter_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BottleneckConfig
from dist_peft.core.errors import UserError
from tests.support.bottlenecks import adapted, gathered, public
from tests.support.tiny_models import ENCODERS

SEQ_BN: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""``config`` as adapters 1.3.0 writes it for the preset seq_bn."""

PRESETS = {
    "pfeiffer": SEQ_BN,
    "houlsby": {
        **SEQ_BN,
        "mh_adapter": True,
        "non_linearity": "swish",
        "original_ln_before": False,
    },
    "parallel": {
        **SEQ_BN,
        "init_weights": "mam_adapter",
        "is_parallel": True,
        "original_ln_before": False,
        "reduction_factor": 2,
        "scaling": 4.0,
    },
}
"""seq_bn, double_seq_bn and par_bn."""


def bert() -> Any:
    return tf.AutoModelForSequenceClassification.from_config(ENCODERS["bert"]).eval()


@pytest.mark.parametrize("placement", PRESETS)
def test_written_as_the_library_does(placement: str, tmp_path: Path) -> None:
    """Every key, value and type of the presets; every tensor's name and shape."""
    made = public(placement)
    write_adapter_directory(tmp_path, made, {"base": "tiny/base"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    preset = PRESETS[placement]
    assert config.pop("config") == preset
    assert all(type(made.config["config"][key]) is type(value) for key, value in preset.items())
    assert config == {
        "hidden_size": 32,
        "model_class": "LlamaForCausalLM",
        "model_name": "tiny/base",
        "model_type": "llama",
        "name": "dist_peft",
        "version": "adapters.1.3.0",
    }
    m = 16 if placement == "parallel" else 2
    sites = ["output_adapters"] + ["attention_adapters"] * (placement == "houlsby")
    shapes = {key: list(t.shape) for key, t in load_file(tmp_path / "adapter.safetensors").items()}
    assert shapes == {
        f"model.layers.{i}.{site}.adapters.dist_peft.adapter_{name}": shape
        for i in range(2)
        for site in sites
        for name, shape in {
            "down.0.weight": [m, 32],
            "down.0.bias": [m],
            "up.weight": [32, m],
            "up.bias": [32],
        }.items()
    }
    assert not (tmp_path / "dist_peft.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("placement", PRESETS)
@pytest.mark.parametrize("norms", [False, True])
def test_read_as_written(placement: str, norms: bool, tmp_path: Path) -> None:
    made = public(placement, train_layernorm=norms, reduction_factor=2.5, dropout=0.1)
    write_adapter_directory(tmp_path, made, {})
    found = read_adapter_directory(tmp_path)
    check_public_adapter(found)
    assert found.config == made.config and found.tensors.keys() == made.tensors.keys()
    assert len(found.extra) == (5 if norms else 0)
    assert parse_bottleneck_config(found.config) == BottleneckConfig(
        placement=placement, train_layernorm=norms, reduction_factor=2.5, dropout=0.1
    )
    layers = parse_bottleneck_tensors(found)
    assert {t["down_weight"].shape for t in layers.values()} == {(12, 32)}


@pytest.mark.parametrize("placement", PRESETS)
def test_places_in_post_norm_blocks(placement: str) -> None:
    """BERT's are called by the part that they are in."""
    _, adapter = adapted(bert(), placement=placement)
    made = adapter.to_public_adapter(gathered(adapter), "tiny/base")
    places = {key.partition(".adapters.")[0] for key in made.tensors}
    parts = ["output"] + ["attention.output"] * (placement == "houlsby")
    assert places == {f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in parts}
    assert parse_bottleneck_tensors(made).keys() == adapter.layers.keys()
    assert made.config["model_class"] == "BertForSequenceClassification"
    key = next(
        key
        for key in made.tensors
        if key.endswith("layer.1.output.adapters.dist_peft.adapter_up.bias")
    )
    less = replace(made, tensors={k: v for k, v in made.tensors.items() if k != key})
    with pytest.raises(
        UserError, match=r"no up_bias of bert\.encoder\.layer\.1\.output\.output_ad"
    ):
        check_public_adapter(less)


def test_the_library_refuses_what_it_would_lose() -> None:
    """It looks up the architecture; no entry means an error."""
    assert public(train_layernorm=True).config["config"]["architecture"] not in (
        *("prefix_tuning", "lora", "mtl_lora", "union", "prompt_tuning", "reft"),
        None,
    )
    assert "architecture" not in public().config["config"]


@pytest.mark.parametrize("placement", PRESETS)
def test_presets_are_the_defaults(placement: str) -> None:
    found = parse_bottleneck_config({"config": PRESETS[placement], "version": "adapters.1.3.0"})
    assert found == BottleneckConfig(placement=placement)


def test_told_from_peft() -> None:
    assert is_adapterhub_config(public().config)
    assert not is_adapterhub_config({"peft_type": "LORA", "r": 8}) and not is_adapterhub_config({})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ln_after": True}, "ln_after is True, not False; of AdapterHub's bottlenecks"),
        ({"leave_out": [0]}, r"leave_out is \[0\], not \[\]"),
        ({"original_ln_before": False}, "original_ln_before is False, not True"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
        ({"is_parallel": True, "mh_adapter": True}, "mh_adapter is True, not False"),
        ({"phm_layer": True}, "phm_layer is True"),
        ({"scaling": "learned"}, "scaling 'learned' is not supported here"),
        ({"reduction_factor": {"1": 8, "default": 2}}, "reduction_factor .* is not supported"),
        ({"non_linearity": "mish"}, "activation 'mish' is not supported here"),
        ({"architecture": "lora"}, "the adapter is AdapterHub's lora; only bottlenecks"),
    ],
)
def test_other_bottlenecks_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_bottleneck_config({"config": {**SEQ_BN, **changes}, "version": "adapters.1.3.0"})


def test_names_that_mean_the_same() -> None:
    config = {**SEQ_BN, "non_linearity": "SiLU"}
    found = parse_bottleneck_config({"config": config, "version": "adapters.1.3.0"})
    assert found.activation == "swish"
    with pytest.raises(UserError, match="load it with adapters and save it again"):
        parse_bottleneck_config({"config": config})


def damaged(change: str) -> PublicAdapter:
    made = public(train_layernorm=change == "norms")
    key = "model.layers.1.attention_adapters.adapters.dist_peft.adapter_up.bias"
    tensors = dict(made.tensors)
    assert key in tensors
    if change == "empty":
        tensors[key] = torch.empty(0)
    elif change == "absent":
        del tensors[key]
    elif change == "foreign":
        tensors["model.layers.1.mlp.up_proj.lora_A.weight"] = torch.zeros(1)
    elif change == "more":
        return replace(made, config={**made.config, "config": SEQ_BN})
    elif change == "norms":
        return replace(made, extra={})
    else:
        tensors = {}
    return replace(made, tensors=tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("empty", r"up.bias has shape \[0\], not \[32\] as its configuration says"),
        ("absent", r"no up_bias of model\.layers\.1\.attention_adapters: it is damaged"),
        ("foreign", r"lora_A\.weight is none of a bottleneck adapter's"),
        ("more", "has tensors in addition to its output_adapters"),
        ("norms", r"layer norms \(dist_peft\.safetensors\) do not fit"),
        ("none", "has no tensors: it was saved without its data"),
    ],
)
def test_damaged(change: str, words: str, tmp_path: Path) -> None:
    made = damaged(change)
    with pytest.raises(UserError, match=words):
        check_public_adapter(made)
    with pytest.raises(RuntimeError, match="refusing to write a damaged adapter"):
        write_adapter_directory(tmp_path / "a", made, {})
    assert not (tmp_path / "a").exists()


def test_directories_without_tensors(tmp_path: Path) -> None:
    write_adapter_directory(tmp_path, public(), {})
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter\.safetensors; is the download complete"):
        read_adapter_directory(tmp_path)
    (tmp_path / "pytorch_adapter.bin").touch()
    with pytest.raises(UserError, match=r"pickle.*save_adapter\(\.\.\., use_safetensors=True\)"):
        read_adapter_directory(tmp_path)


def test_merge_is_refused(tmp_path: Path) -> None:
    write_adapter_directory(tmp_path, public(), {})
    with pytest.raises(UserError, match=r"nonlinearity, so no weight .* it cannot be merged; use"):
        open_adapter_merger(tmp_path)


def test_norms_are_extra() -> None:
    described = ModelDescription("tiny/base", "LlamaForCausalLM", "llama", 32)
    norms = {"model.norm": {"weight_change": torch.ones(32)}}
    made = to_public_bottleneck(BottleneckConfig(train_layernorm=True), described, {}, norms)
    assert made.extra.keys() == {"model.norm.weight_change"} and not made.tensors
