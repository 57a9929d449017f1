"""``app.run_consistency``: what merges and exports believe of a run directory."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import save_config, tiny_tree

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("consistency")
    tree = tiny_tree(directory, train__steps=1)
    save_config(directory, tree)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    return directory


@pytest.fixture
def run(finished: Path) -> Iterator[Path]:
    """The run directory; whatever a test changes in it or in the base is restored."""
    kept = finished / "kept"
    for name in ("run", "base"):
        shutil.copytree(finished / name, kept / name)
    yield finished / "run"
    close_log()
    for name in ("run", "base"):
        shutil.rmtree(finished / name)
        shutil.move(kept / name, finished / name)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def exchange_two_tokens(base: Path) -> None:
    tree = json.loads((base / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    words["w10"], words["w20"] = words["w20"], words["w10"]
    (base / "tokenizer.json").write_text(json.dumps(tree))


def remove_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


VERBS = (["merge"], ["export", "--format", "hf-bf16"], ["export", "--format", "bnb-nf4"])


@pytest.mark.parametrize("change", [exchange_two_tokens, remove_tokenizer])
def test_another_tokenizer_of_the_base_is_refused(
    run: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """It would go into the merged model; logits of given token ids are the same with it."""
    change(run.parent / "base")
    out = run.parent / "out"
    for verb in VERBS:
        assert cli.main([*verb, "--run", str(run), "--out", str(out), "--no-verify"]) == 2
        assert "tokenizer of" in capsys.readouterr().err and not out.exists()
    config = str(run.parent / "config.yaml")
    assert cli.main(["eval", "--config", config, "--run", str(run)]) == 2
    assert "tokenizer of" in capsys.readouterr().err
    # with another version of the library it may be the same one
    edit_json(run / "adapter" / "dist_peft.json", tokenizers="0.1")
    if change is exchange_two_tokens:
        argv = ["merge", "--run", str(run), "--out", str(out), "--no-verify"]
        assert cli.main(argv) == 0 and "version 0.1 of tokenizers" in capsys.readouterr().err
        shutil.rmtree(out)


@pytest.mark.parametrize("turn_end", ["x", [2.5], [97]], ids=str)
def test_damaged_end_of_turn(run: Path, turn_end: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells merged models where to stop."""
    edit_json(run / "adapter" / "dist_peft.json", turn_end=turn_end)
    out = run.parent / "out"
    assert cli.main(["merge", "--run", str(run), "--out", str(out), "--no-verify"]) == 2
    message = capsys.readouterr().err
    assert "dist_peft.json is damaged: turn_end" in message and not out.exists()


def test_run_that_goes_on_after_its_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in a later training, it has the adapter of the earlier one."""
    out = run.parent / "out"
    for state in ("running", "stopped", "failed"):
        edit_json(run / "run_state.json", state=state, step=4)
        for verb in (*VERBS, ["export", "--format", "peft"]):
            assert cli.main([*verb, "--run", str(run), "--out", str(out), "--no-verify"]) == 2
            message = capsys.readouterr().err
            found = "failed" if state == "running" else state  # without a lock it has ended
            assert f"{found} at step 4: adapter/ may be of the run before" in message
            assert not out.exists()
    edit_json(run / "run_state.json", state="refused")
    assert cli.main(["merge", "--run", str(run), "--out", str(out), "--no-verify"]) == 0
    shutil.rmtree(out)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_links_out_of_the_run_are_not_written_to(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's run directory would append to any file of the user."""
    (victim := run.parent / "victim").write_text("precious\n")
    (run / name).unlink()
    (run / name).symlink_to(victim)
    config = str(run.parent / "config.yaml")
    assert cli.main(["train", "--config", config, "train.steps=2"]) == 2
    assert f"{run / name} is a link to {victim}" in capsys.readouterr().err
    assert victim.read_text() == "precious\n"
