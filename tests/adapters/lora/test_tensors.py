"""QA-LoRA's part of the checks; LoRA's are in ``test_directory``."""

from typing import Any

import pytest
import torch

from dist_peft.adapters.lora.tensors import build_peft_key, parse_lora_tensors
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError

SIZE, GROUPS = 8, 6


def public(convention: str = "sum", **extra: torch.Tensor) -> PublicAdapter:
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "peft_type": "QALORA"}
    config |= {"qalora_group_size": SIZE, "qalora_pool": convention}
    tensors = {"lora_A": torch.ones(2, GROUPS), "lora_B": torch.ones(5, 2), **extra}
    return PublicAdapter(config, {build_peft_key("a.b", name): v for name, v in tensors.items()})


@pytest.mark.parametrize(
    ("convention", "factor"), [("sum", 1.0), ("mean", 1 / SIZE), ("peft", GROUPS / SIZE)]
)
def test_are_brought_to_the_sum(convention: str, factor: float) -> None:
    found = parse_lora_tensors(public(convention))["a.b"]
    assert (found.pool, found.scaling, found.shape) == (SIZE, 1.5, (5, GROUPS * SIZE))
    assert torch.equal(found.B, torch.full((5, 2), factor))
    assert torch.equal(found.expanded_lora_A(), torch.ones(2, GROUPS * SIZE))


def test_wide_A_repeats_columns() -> None:
    A = torch.arange(12.0).view(2, 6)
    wide = parse_lora_tensors(public(lora_A=A))["a.b"].expanded_lora_A()
    assert torch.equal(wide[:, SIZE - 1], A[:, 0]) and torch.equal(wide[:, SIZE], A[:, 1])


def test_magnitude_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.b: QA-LoRA is for linears, without DoRA"):
        parse_lora_tensors(public(magnitude=torch.ones(5)))


def test_shapes_are_checked() -> None:
    with pytest.raises(UserError, match=r"lora_A\.weight has shape \[3, 6\], not \[2, \*\]"):
        parse_lora_tensors(public(lora_A=torch.ones(3, 6)))
