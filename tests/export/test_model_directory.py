"""What directories of all formats share."""

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.model_directory import (
    check_output_free,
    copy_tokenizer_files,
    list_unpacked_linears,
    write_model_directory,
)
from dist_peft.model.model_files import copy_model_files
from tests.support.export_runs import make_run


def test_unpacked_linears_are_the_head_and_what_is_left(tmp_path: Path) -> None:
    for tied in (False, True):
        run = make_run(tmp_path / str(tied), QuantConfig(), tie_word_embeddings=tied)
        with run.job(tmp_path / "out").open_weights() as walk:
            assert list_unpacked_linears(walk, ["some.path"]) == ["lm_head", "some.path"]


def test_without_a_packer_every_weight_is_dense(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig())
    with run.job(tmp_path / "out").open_weights("decoded") as walk:
        written = write_model_directory(walk, None, tmp_path / "out", torch.float16)
        assert (written.tensors, written.packed, written.merged) == (len(run.trained), 0, 14)
    assert written.bytes_written == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig())
    (run.directory / "LICENSE").write_text("licence")
    (run.adapter_dir / "chat_template.jinja").write_text("template")
    (tmp_path / "out").mkdir()
    copy_model_files(run.directory, tmp_path / "out", torch.float16, {"new": {"key": 1}})
    copy_tokenizer_files(run.adapter_dir, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["new"] == {"key": 1}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"LICENSE", "tokenizer.json", "chat_template.jinja"}
    assert not any("safetensors" in name for name in names)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE"])
def test_a_disk_that_fills_up_while_files_are_copied(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text("x" * 1000)
    monkeypatch.setattr(shutil, "copyfile", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(
        UserError, match=f"disk full while writing .*{name}: 1,000 bytes are needed"
    ):
        copy_model_files(tmp_path / "base", tmp_path, torch.float32, {})


def test_check_new(tmp_path: Path) -> None:
    check_output_free(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_output_free(tmp_path / "file")
    with pytest.raises(UserError, match="not empty"):
        check_output_free(tmp_path)
