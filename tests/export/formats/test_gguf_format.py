"""``gguf``: name and type of the file; its content is tested in ``test_gguf_file``."""

from pathlib import Path

import pytest

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats import gguf_format
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import make_run


def test_type_follows_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32), group=32)
    kept = export_model("gguf", run.job(tmp_path / "kept", pooled=True))
    assert kept.exact and kept.path == tmp_path / "kept" / "model-q4_1.gguf"
    merged = export_model("gguf", run.job(tmp_path / "merged"))
    assert not merged.exact and merged.how == "merged: Q8_0"
    half = export_model("gguf", run.job(tmp_path / "a.gguf", type="f16", into="decoded"))
    assert half.exact and half.path == tmp_path / "a.gguf"


def test_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, QuantConfig())
    monkeypatch.setattr(gguf_format, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dist_peft\[export\]"):
        export_model("gguf", run.job(tmp_path / "out"))
