"""LoRA's public form; against PEFT itself in ``tests/adapters/test_directory.py``."""

import pytest

from dist_peft.adapters.lora.format import LoraFormat, build_common_config
from dist_peft.core.config.run import LoraConfig


def test_description_of_a_configuration() -> None:
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "use_dora": True}
    assert LoraFormat().describe(config) == "LORA r=5 alpha=10 rslora=False dora=True"


@pytest.mark.parametrize(("alpha", "kind"), [(16, int), (16.0, int), (2.5, float)])
def test_a_whole_alpha_is_an_integer(alpha: float, kind: type) -> None:
    config = build_common_config(LoraConfig(r=5, alpha=alpha), ["q_proj"], "base")
    assert type(config["lora_alpha"]) is kind and config["lora_alpha"] == alpha
