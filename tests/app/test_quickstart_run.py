"""The parts of the quickstart; the whole of it: ``commands/test_quickstart``."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dist_peft.app.quickstart_run import (
    CONFIG_NAME,
    build_quickstart_config,
    check_earlier_results,
    format_sample,
    launch_training,
    remove_earlier_results,
)
from dist_peft.core.config.io import dump_config
from dist_peft.core.errors import UserError


def test_configuration(tmp_path: Path) -> None:
    files = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    config = build_quickstart_config("a/b", *files, tmp_path / "run", steps=7)
    assert config.base.path == "a/b" and config.base.quant is not None
    assert config.base.quant.kind == "nf4"
    assert [s.path for s in config.data.train + config.data.eval] == [str(f) for f in files]
    assert config.train.steps == 7 and config.save.dir == str(tmp_path / "run")


@pytest.mark.parametrize("ranks", [1, 3])
def test_training_is_launched_as_a_user_would(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.CompletedProcess([], 2)
    with (
        mock.patch.object(subprocess, "run", return_value=done) as run,
        pytest.raises(UserError, match="training ended with exit code 2"),
    ):
        launch_training(tmp_path / "q.yaml", ranks)
    (command,) = run.call_args.args
    assert command[0] == sys.executable
    assert command[-5:] == ["-m", "dist_peft", "train", "--config", str(tmp_path / "q.yaml")]
    assert ("--nproc_per_node=3" in command) == (ranks == 3)
    assert " ".join(command[1:]) in capsys.readouterr().out


def test_a_card_is_one_line_and_its_beginning() -> None:
    card = "kind: method\narguments: self\nsummary: Return it."
    assert format_sample("### Function\ndef f(self):\n### Card\n", card, "#\n" * 30, "") == [
        "def f(self):",
        "  reference   kind: method | arguments: self | summary: Return it.",
        "  base        # | # | # ...",
        "  fine-tuned  ",
    ]


def test_only_earlier_results_are_removed(tmp_path: Path) -> None:
    check_earlier_results(tmp_path)  # nothing is there
    run, merged, other = tmp_path / "run", tmp_path / "merged", tmp_path / "other"
    files = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    config = build_quickstart_config("a/b", *files, run, steps=7)
    run.mkdir()
    refused = "run exists and was not made by the quickstart"
    with pytest.raises(UserError, match=refused):
        check_earlier_results(tmp_path)
    (run / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match=refused):  # a run of the user's
        check_earlier_results(tmp_path)
    elsewhere = build_quickstart_config("a/b", *files, other, steps=7)
    (tmp_path / CONFIG_NAME).write_text(dump_config(elsewhere))
    with pytest.raises(UserError, match=refused):
        check_earlier_results(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(dump_config(config))
    check_earlier_results(tmp_path)
    merged.mkdir()
    with pytest.raises(UserError, match="merged exists and was not made by the quickstart"):
        check_earlier_results(tmp_path)
    (merged / "merge_record.json").write_text("{}")
    check_earlier_results(tmp_path)
    remove_earlier_results(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME}
