from typing import Any

import pytest
import torch

from dist_peft.adapters.adapter_format import ADAPTER_FORMATS
from dist_peft.adapters.protocol import PeftFormat, collect_gathered_parameters


def test_whole_parameters() -> None:
    tensors = {"a.b.A": torch.ones(2, 3), "a.b.B": torch.zeros(1), "c.d": torch.zeros(1)}
    found = collect_gathered_parameters(tensors, {"a.b": {"A": (2, 3), "B": (1,)}})
    assert found.keys() == {"a.b"} and found["a.b"]["A"] is tensors["a.b.A"]
    for shape, name in {(3, 2): "A", (2, 3): "C"}.items():
        with pytest.raises(RuntimeError, match=rf"a\.b\.{name} .*the parameters were not gathered"):
            collect_gathered_parameters(tensors, {"a.b": {name: shape}})
    with pytest.raises(RuntimeError, match=r"has shape \[0\], expected \[0\]"):
        collect_gathered_parameters({"a.A": torch.empty(0)}, {"a": {"A": (0,)}})


class ShiftFormat(PeftFormat):
    peft_types = ("SHIFT", "SHIFT_PLACED")


@pytest.mark.parametrize(
    ("config", "matches"),
    [({"peft_type": "SHIFT_PLACED"}, True), ({"peft_type": "LORA"}, False), ({}, False)],
)
def test_a_format_is_found_by_its_types(config: dict[str, Any], matches: bool) -> None:
    assert ShiftFormat().matches(config) is matches
    assert not PeftFormat().matches(config)


def test_formats_with_types_have_the_files_of_peft() -> None:
    formats = [known for known in ADAPTER_FORMATS if known.peft_types]
    assert formats and all(isinstance(known, PeftFormat) for known in formats)
    assert {known.tensors_file for known in formats} == {"adapter_model.safetensors"}
