import json
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.model.quantization_origin import read_quantization_origin

OWN = {"quant_method": "dist_peft", "kind": "nf4"}


@pytest.mark.parametrize(
    ("described", "origin"),
    [
        ({"quantization_config": {**OWN, "made_from": {"base": "org/name"}}}, {"base": "org/name"}),
        ({"quantization_config": OWN}, {}),
        ({"quantization_config": {**OWN, "made_from": "org/name"}}, {}),
        ({"quantization_config": {"quant_method": "gptq", "made_from": {"base": "b"}}}, {}),
        ({"quantization_config": None}, {}),
        ({}, {}),
    ],
)
def test_origin_is_read_from_own_directories_only(
    described: dict[str, object], origin: dict[str, object], tmp_path: Path
) -> None:
    assert read_quantization_origin(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert read_quantization_origin(tmp_path) == origin


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_quantization_origin(tmp_path)
