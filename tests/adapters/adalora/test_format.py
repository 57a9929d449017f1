from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dist_peft.adapters.adalora.format import AdaLoraFormat
from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import AdaLoraConfig
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, disturb, gathered, ids, tiny_llama
from tests.support.peft_equality import (
    check_loaded_by_peft,
    check_merged,
    check_read_from_peft,
)

PATH = "base_model.model.m.q_proj"


def test_peft_loads_the_same_function(tmp_path: Path) -> None:
    public = check_loaded_by_peft(tmp_path, AdaLoraConfig, init_r=5, target_r=3, alpha=40.0)
    known = find_format(public.config)
    assert isinstance(known, AdaLoraFormat)
    assert known.describe(public.config) == "ADALORA init_r=5 target_r=3 alpha=40"


def test_dropped_triplets_are_left_out(tmp_path: Path) -> None:
    """Of one module all of them."""
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, method=AdaLoraConfig, init_r=4, target_r=2, alpha=40.0)
    disturb(model)
    with torch.no_grad():
        for number, layer in enumerate(adapter.layers.values()):  # type: ignore[attr-defined]
            layer.lora_E[number % 5 :] = 0
        expected = model(ids()).logits
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    ranks = {v.shape[0] for name, v in public.tensors.items() if name.endswith("lora_A")}
    assert ranks == {0, 1, 2, 3, 4}
    write_adapter_directory(tmp_path, public, {})
    check_merged(tmp_path, original, expected)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(bias=True), tmp_path).eval()
    with torch.no_grad():
        found = theirs(input_ids=ids()).logits
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_pefts_own_directory_is_read(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=60, target_modules=["q_proj", "down_proj"]
    )
    check_read_from_peft(tmp_path, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"m.q_proj.lora_E": [True, False, True]}}, "must have 2 truth values"),
        ({"rank_pattern": {"m.q_proj.lora_E": [True, False]}}, r"lora_A has shape \[2, 3\], not"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"init_r": None}, "no usable init_r and lora_alpha: None"),
        ({"bias": "all"}, "trained with bias"),
    ],
)
def test_damaged_adapters_are_refused(config: dict[str, Any], message: str) -> None:
    tensors = {
        f"{PATH}.lora_A": torch.ones(2, 3),
        f"{PATH}.lora_E": torch.ones(2, 1),
        f"{PATH}.lora_B": torch.ones(4, 2),
    }
    whole = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2, **config}
    with pytest.raises(UserError, match=message):
        AdaLoraFormat().check(PublicAdapter(whole, tensors))
