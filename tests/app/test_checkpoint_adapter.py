"""The adapter of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.app.checkpoint_adapter import format_adapter_files
from dist_peft.app.cli import main
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e


def test_files_of_a_checkpoint() -> None:
    files = format_adapter_files({"kind": "lora", "turn_end": [2]}, None)
    assert {name: json.loads(text) for name, text in files.items()} == {
        "adapter.json": {"kind": "lora", "turn_end": [2]}
    }
    assert format_adapter_files({}, "{{ x }}")["chat_template.jinja"] == "{{ x }}"


def test_a_stopped_run_is_merged_exported_and_evaluated_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints give what the finished run gives, also where directory and cwd are others."""
    project = tmp_path / "project"
    project.mkdir()
    tree = tiny_tree(project, base__path="project/base", adapter={"r": 5, "init": "pissa"})
    tree["base"]["quant"] = {"kind": "nf4"}
    tree["train"] |= {"steps": 3, "eval_every": 1}
    tree["save"] |= {"every": 0, "keep": 1, "keep_best": True}
    monkeypatch.chdir(tmp_path)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    assert json.loads((project / "run" / "run_state.json").read_text())["state"] == "finished"
    trained = load_file(project / "run" / "adapter" / "adapter_model.safetensors")
    project.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    run = tmp_path / "moved" / "run"
    (run / "adapter").rename(tmp_path / "adapter")  # as if it had been stopped after its last step
    (run / "report.json").unlink()
    argv = ["export", "--format", "peft", "--run", str(run)]
    assert main([*argv, "--out", str(tmp_path / "none")]) == 2
    assert "--checkpoint last" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main([*argv, "--checkpoint", "last", "--no-verify", "--out", str(out)]) == 0
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    about = [json.loads((d / "dist_peft.json").read_text()) for d in (out, tmp_path / "adapter")]
    for facts in about:
        facts.pop("peft_form", None)
        facts.pop("adapter_config")  # names the base by where it is
    assert about[0] == about[1]
    argv = ["merge", "--run", str(run), "--checkpoint", "best", "--base", "decoded"]
    assert main([*argv, "--out", str(tmp_path / "merged")]) == 0
    assert "logits against the trained model" in capsys.readouterr().err
    assert main([*argv, "--no-verify", "--out", str(tmp_path / "merged")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--no-verify", "--overwrite", "--out", str(tmp_path / "merged")]) == 0
    argv = ["eval", "--config", str(run / "config.yaml"), "--run", str(run)]
    assert main([*argv, "--checkpoint", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 3
    assert main([*argv, "--checkpoint", "2"]) == 2
    assert "there are steps 3" in capsys.readouterr().err
    assert main(["inspect", str(run)]) == 0
    assert "state        finished at step 3" in capsys.readouterr().out
    close_log()
