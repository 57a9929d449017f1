"""PEFT's files; each method's own part is tested in its folder."""

from typing import Any

import pytest

from dist_peft.adapters.adapter_format import ADAPTER_FORMATS
from dist_peft.adapters.peft_format import PeftFormat


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
