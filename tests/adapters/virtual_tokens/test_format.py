"""Our ``adapter_config.json`` against the one that real PEFT writes; damaged directories."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.virtual_tokens.format import (
    TENSOR,
    VirtualTokensFormat,
    build_prompt_config,
    check_prompt_adapter,
    read_kv_shape,
)
from dist_peft.core.config.run import PrefixConfig, PromptConfig, PTuningConfig, VirtualTokensConfig
from dist_peft.core.errors import UserError
from tests.support.tiny_models import CONFIGS
from tests.support.tiny_runs import save_base
from tests.support.virtual_tokens import load

BOTH: dict[str, tuple[VirtualTokensConfig, type[Any], dict[str, Any]]] = {
    "prompt": (PromptConfig(num_virtual_tokens=3, init="random"), peft.PromptTuningConfig, {}),
    "vocab": (
        PromptConfig(num_virtual_tokens=3),
        peft.PromptTuningConfig,
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "text": (
        PromptConfig(num_virtual_tokens=3, init="text", init_text="w5 w6"),
        peft.PromptTuningConfig,
        {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "w5 w6",
            "tokenizer_name_or_path": "BASE",
        },
    ),
    "mlp": (PTuningConfig(num_virtual_tokens=3), peft.PromptEncoderConfig, {}),
    "lstm": (
        PTuningConfig(
            num_virtual_tokens=3,
            encoder="lstm",
            encoder_hidden_size=8,
            encoder_layers=3,
            dropout=0.1,
        ),
        peft.PromptEncoderConfig,
        {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 8,
            "encoder_num_layers": 3,
            "encoder_dropout": 0.1,
        },
    ),
    "prefix": (
        PrefixConfig(num_virtual_tokens=3),
        peft.PrefixTuningConfig,
        {"prefix_projection": True},
    ),
}


@pytest.mark.parametrize("case", BOTH)
def test_as_peft_writes_it(case: str, tmp_path: Path) -> None:
    config, kind, settings = BOTH[case]
    base = save_base(tmp_path / "base")
    settings = {k: str(base) if v == "BASE" else v for k, v in settings.items()}
    theirs = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    model = load(base)
    peft.get_peft_model(model, theirs).save_pretrained(tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensor = load_file(tmp_path / "peft" / "adapter_model.safetensors")[TENSOR]
    mine = build_prompt_config(config, str(base), model.config, CONFIGS["llama"].hidden_size)
    for key, value in mine.items():
        assert written[key] == value, key
    left_out = {key: value for key, value in written.items() if key not in mine}
    assert {k for k, v in left_out.items() if v is not None} <= {"peft_version"}, left_out
    check_prompt_adapter(PublicAdapter(mine, {TENSOR: tensor}))  # and so does the shape
    assert torch.equal(read_adapter_directory(tmp_path / "peft").tensors[TENSOR], tensor)


def test_heads_of_grouped_and_plain_attention() -> None:
    assert read_kv_shape(CONFIGS["llama"]) == (2, 16)
    assert read_kv_shape(CONFIGS["qwen2"]) == (2, 16)
    assert read_kv_shape(CONFIGS["gpt_neox"]) == (4, 16)


def public() -> PublicAdapter:
    config = build_prompt_config(PrefixConfig(num_virtual_tokens=3), "base", CONFIGS["llama"], 0)
    return PublicAdapter(config, {TENSOR: torch.zeros(3, 128)})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    check_prompt_adapter(public())
    damaged: list[tuple[PublicAdapter, str]] = [
        (PublicAdapter(public().config, {}), r"tensors \[\] instead of prompt_embeddings alone"),
        (
            PublicAdapter(public().config, {TENSOR: torch.zeros(0, 128)}),
            r"shape \[0, 128\], not \[3, 128\]",
        ),
        (
            PublicAdapter({**public().config, "num_layers": None}, public().tensors),
            "lacks num_virtual_tokens, token_dim or num_layers",
        ),
    ]
    for adapter, words in damaged:
        with pytest.raises(UserError, match=words):
            check_prompt_adapter(adapter)
        with pytest.raises(RuntimeError, match="refusing to write a damaged adapter"):
            write_adapter_directory(tmp_path / "adapter", adapter, {})
    assert not (tmp_path / "adapter").exists()


def test_there_is_nothing_to_merge() -> None:
    with pytest.raises(UserError, match="PREFIX_TUNING: virtual tokens change no weight"):
        VirtualTokensFormat().open_merger(public(), tied=False)
