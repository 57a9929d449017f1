"""vLLM's rules, one by one."""

from typing import Any

import pytest

from dist_peft.app.server_support import describe_vllm_support

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "modules_to_save": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "yes"),
        ({"use_rslora": True, "rank_pattern": {}}, "yes"),
        ({"r": 16}, "yes"),
        ({"r": 17}, "yes, with --max-lora-rank 32"),
        ({"r": 257}, "yes, with --max-lora-rank 320"),
        ({"r": 513}, "no: rank 513 is above its largest, 512"),
        ({"bias": "all"}, "no: biases (bias: all)"),
        ({"lora_bias": True}, "no: biases (lora_bias)"),
        ({"use_dora": True}, "no: DoRA (use_dora); merge the run"),
        ({"modules_to_save": ["score"]}, "no: modules_to_save: score"),
        ({"use_qalora": True}, "no: QA-LoRA; export it with --format peft-expanded"),
        ({"peft_type": "QALORA"}, "no: QA-LoRA; export it with --format peft-expanded"),
        ({"peft_type": "IA3"}, "no: it serves LoRA, not IA3"),
        ({"peft_type": None}, "no: it serves LoRA, not a configuration without peft_type"),
        ({"use_dora": True, "bias": "all"}, "no: DoRA (use_dora); merge the run; biases"),
    ],
    ids=str,
)
def test_reasons(changes: dict[str, Any], expected: str) -> None:
    assert describe_vllm_support({**LORA, **changes}).startswith(expected)


@pytest.mark.parametrize("key", ["target_parameters", "alpha_pattern", "rank_pattern"])
def test_settings_that_it_does_not_read(key: str) -> None:
    value = ["experts.down_proj"] if key == "target_parameters" else {"q_proj": 4}
    assert describe_vllm_support({**LORA, key: value}).startswith("no: ")
    assert key in describe_vllm_support({**LORA, key: value})
