"""An adapter on a base that another version of its codec would quantize otherwise is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app import cli
from dist_peft.app.codec_versions import (
    describe_codec,
    describe_other_codec,
    read_codec_version,
    refuse_other_codec,
)
from dist_peft.core.config.quantization import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.tiny_runs import save_config, tiny_tree, train

NF4 = QuantConfig.model_validate({"kind": "nf4"})


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def test_files_without_a_version_are_of_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_codec(None) == {} and describe_codec(NF4) == {"codec_version": 1}
    assert describe_other_codec({}, "nf4", "f") is None
    refuse_other_codec({"codec_version": 7}, None, "adapter a", "f")  # quantized no more
    monkeypatch.setattr(Nf4Codec, "codec_version", 2)
    assert describe_other_codec({"codec_version": 2}, "nf4", "f") is None
    assert describe_other_codec({}, "int", "f") is None  # versions are of one codec
    with pytest.raises(UserError, match="adapter a was trained on a base of nf4 codec version 1, "):
        refuse_other_codec({}, NF4, "adapter a", "f")
    with pytest.raises(UserError, match=r"this program has 2: .*use dist_peft 0\.3, which trained"):
        refuse_other_codec({"dist_peft": "0.3"}, NF4, "adapter a", "f")


@pytest.mark.parametrize("value", [0, -1, True, "1", None, 1.0])
def test_a_value_that_is_no_version_is_damage(value: Any) -> None:
    with pytest.raises(UserError, match="f is damaged: codec_version"):
        read_codec_version({"codec_version": value}, "f")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on an NF4 base, and a merge of it into the dequantized base."""
    path = tmp_path_factory.mktemp("codec")
    tree = tiny_tree(path, base__quant={"kind": "nf4"})
    save_config(path, tree)
    assert train(tree) == 0
    assert merge(path, path / "merged") == 0
    close_log()
    return path


def merge(path: Path, out: Path) -> int:
    argv = ["merge", "--run", str(path / "run"), "--base", "decoded", "--out", str(out)]
    return cli.main([*argv, "--no-verify"])


@pytest.mark.e2e
def test_merge_resume_and_switch_refuse_another_version(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    about = json.loads((place / "run" / "adapter" / "dist_peft.json").read_text())
    record = json.loads((place / "merged" / "merge_record.json").read_text())
    checkpoints = list((place / "run" / "checkpoints").glob("*/base.json"))
    found = [about, record["base"], *(json.loads(file.read_text()) for file in checkpoints)]
    assert len(found) > 2 and [each["codec_version"] for each in found] == [1] * len(found)
    assert "(codec version 1)" in (place / "merged" / "README.md").read_text()
    shutil.copytree(place / "merged", tmp_path / "merged")
    monkeypatch.setattr(Nf4Codec, "codec_version", 2)
    run, out = str(place / "run"), str(tmp_path / "out")
    switch = ["switch", "--merged", str(tmp_path / "merged"), "--from", run, "--to", "none"]
    for argv in (
        ["merge", "--run", run, "--base", "decoded", "--out", out, "--no-verify"],
        [*switch, "--out", out, "--no-verify"],
        ["eval", "--run", run, "--config", str(place / "config.yaml")],
    ):
        capsys.readouterr()
        assert cli.main(argv) == 2, argv
        close_log()
        assert "nf4 codec version 1, and this program has 2" in capsys.readouterr().err, argv
    assert not Path(out).exists()
