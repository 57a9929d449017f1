"""``app.output_places``: nothing is written into a model, an adapter or the parts of a run."""

from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from tests.support.tiny_runs import save_config, tiny_tree


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A run, a model and an adapter as other commands leave them, without contents."""
    for name in ("run/adapter", "run/checkpoints/step-000001", "run/merged", "model", "free"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "run/config.yaml",
        "run/adapter/dist_peft.json",
        "model/config.json",
        "model/model.safetensors",
        "free/config.json",
    ):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("run/adapter/merged", "lies in the adapter's directory"),
        ("run/adapter", "lies in adapter/ of the run"),
        ("run/base", "lies in base/ of the run"),
        ("run/checkpoints/step-000002", "lies in checkpoints/ of the run"),
        ("run/tensorboard/a/b", "lies in tensorboard/ of the run"),
        ("model/merged", "lies in the model's directory"),
        ("model/a/b.gguf", "lies in the model's directory"),
        ("link/merged", "lies in the model's directory"),
        ("free/../model/x", "lies in the model's directory"),
    ],
)
def test_places_of_something_else(places: Path, out: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--out .* {message} .*; choose another place|{message}"):
        refuse_taken_place(places / out, "--out")


@pytest.mark.parametrize("out", ["run/merged", "run/merged/x", "free/x", "model", "base", "new/x"])
def test_places_that_are_free(places: Path, out: str) -> None:
    refuse_taken_place(places / out, "--out")


def test_a_directory_that_exists_is_none_itself(places: Path) -> None:
    refuse_taken_place(places / "run", "save.dir", new=False)
    with pytest.raises(UserError, match=r"save\.dir .* lies in the model's directory"):
        refuse_taken_place(places / "model", "save.dir", new=False)


def test_commands_refuse_them_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(tmp_path, base__quant={"kind": "nf4"})
    config, base = str(save_config(tmp_path, tree)), tmp_path / "base"
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["train", "--config", config, f"save.dir={base}"],
        ["train", "--config", config, f"save.dir={base}/runs/a"],
        ["quantize", "--config", config, "--out", f"{base}/packed"],
        ["merge", "--run", str(tmp_path), "--out", f"{base}/merged"],
        ["export", "--run", str(tmp_path), "--format", "gguf", "--out", f"{base}/m.gguf"],
    ):
        assert cli.main(command) == 2
        assert f"lies in the model's directory {base}" in capsys.readouterr().err
        close_log()
    assert sorted(tmp_path.rglob("*")) == before
