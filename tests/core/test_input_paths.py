import os
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import find_path_fault, refuse_special_file, refuse_special_files


@pytest.mark.parametrize(
    "text", ["a", "/tmp/a b", "~/x", "org/name", "x" * 255, "ü" * 127, "d/../e"]
)
def test_usable(text: str) -> None:
    assert find_path_fault(text) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (" \t", "empty"),
        ("a\0b", "null"),
        ("d/" + "x" * 256, "256 bytes"),
        ("ü" * 128, "256 bytes"),
        ("x/" * 2048, "too long"),
    ],
)
def test_fault(text: str, fault: str) -> None:
    found = find_path_fault(text)
    assert found is not None and fault in found


def test_limits_are_the_systems(tmp_path: Path) -> None:
    (tmp_path / ("x" * 255)).touch()
    with pytest.raises(OSError, match="too long"):
        (tmp_path / ("x" * 256)).touch()


def test_special_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nothing").symlink_to("nowhere")
    refuse_special_files(tmp_path)
    refuse_special_files(tmp_path / "plain")
    refuse_special_file(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a named pipe, not a regular file"):
        refuse_special_files(tmp_path)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="zero is a device"):
        refuse_special_file(tmp_path / "zero")
