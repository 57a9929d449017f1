from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.core.errors import UserError
from dist_peft.export.merge_record import RECORD_NAME, MergeRecord, hash_adapter


def save_adapter(directory: Path, value: float) -> Path:
    directory.mkdir()
    save_file({"a": torch.full((2, 3), value)}, directory / "adapter_model.safetensors")
    return directory


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    first, second = (save_adapter(tmp_path / str(n), n) for n in (1, 2))
    assert hash_adapter(first) != hash_adapter(second)
    made = MergeRecord.of_adapter(
        first, format="mlx", state="codes", dtype="float32", stop_tokens=[5, 7]
    )
    assert made.adapter == hash_adapter(first)
    made.write_to_directory(tmp_path)
    assert MergeRecord.read_from_directory(tmp_path) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[]", "is damaged|no JSON object|not"),
        ('{"version": 2}', "has version 2"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 1, "format": 3, "state": "codes", "dtype": "x", "adapter": null}', "type"),
    ],
)
def test_damaged_records(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(UserError, match=message):
        MergeRecord.read_from_directory(tmp_path)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no merge_record"):
        MergeRecord.read_from_directory(tmp_path)
