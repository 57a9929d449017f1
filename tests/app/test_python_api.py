"""Every block of docs/python.md runs; the loop of the page is the run of ``dist-peft train``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dist_peft
from dist_peft import UserError, attach, export_run, load, load_config, merge_run
from dist_peft.app import cli
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import RunFailure
from tests.support.tiny_runs import save_config, tiny_tree, train

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tiny_tree(tmp_path, train__schedule="constant", train__warmup=0)
    save_config(tmp_path, tree).rename(tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_runs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), {})
    text = capsys.readouterr().out
    assert "step 5: loss" in text and "transformers" in text
    assert (workspace / "merged" / "config.json").is_file()
    assert (workspace / "adapter" / "adapter_model.safetensors").is_file()


def test_the_loop_gives_the_adapter_of_the_command_bit_for_bit(workspace: Path) -> None:
    config = load_config("run.yaml", ["save.dir=runs/loop"])
    with load(config) as base, attach(base) as model:
        for step in range(config.train.steps or 0):
            model.forward_backward(*model.load_batches(step))
            model.optim_step()
        assert model.save() == Path("runs/loop")
        with pytest.raises(UserError, match="not empty"):
            model.save()
    assert cli.main(["train", "--config", "run.yaml"]) == 0
    own, command = (
        load_file(path / "adapter" / "adapter_model.safetensors")
        for path in (Path("runs/loop"), Path("run"))
    )
    assert own.keys() == command.keys()
    assert all(torch.equal(own[name], command[name]) for name in own)
    texts = [(Path(p) / "adapter" / "dist_peft.json").read_text() for p in ("runs/loop", "run")]
    assert json.loads(texts[0]) == json.loads(texts[1])
    found = merge_run("runs/loop", "merged").comparison
    same = merge_run("run", "merged-2").comparison
    assert found is not None and found == same


def test_saved_runs_keep_the_section_that_was_attached(workspace: Path) -> None:
    with load("run.yaml") as base, attach(base, {"kind": "ia3"}) as model:
        model.forward_backward(*model.load_batches(0))
        model.optim_step()
        model.save("runs/ia3")
    assert load_config("runs/ia3/config.yaml").adapter.kind == "ia3"
    outcome = export_run("runs/ia3", "out", "peft")
    assert outcome.consumer is not None and outcome.comparison is not None


def test_wrong_calls_have_one_message(workspace: Path) -> None:
    with pytest.raises(UserError, match="overrides change a YAML file"):
        load(tiny_tree(workspace), ["train.steps=2"])
    with pytest.raises(UserError, match="use dist-peft train"):
        load("run.yaml", ["train.tasks=separate"])
    with pytest.raises(UserError, match="no format 'pfet'; one of hf-bf16, peft"):
        export_run("run", "out", "pfet")
    with load(parse_config(tiny_tree(workspace))) as base:
        with pytest.raises(UserError, match=r"adapter\.kind is none"):
            attach(base, {"kind": "none"})
        with pytest.raises(UserError, match="rank"):
            attach(base, {"kind": "lora", "rank": 8})
        with attach(base) as model:
            with pytest.raises(UserError, match="needs the gradients"):
                model.optim_step()
            with pytest.raises(UserError, match="at least one batch"):
                model.forward_backward([])
            batches, targets = model.load_batches(0)
            model.forward_backward(batches, targets)
            with pytest.raises(UserError, match="was called twice"):
                model.forward_backward(batches, targets)
            for parameter in model.built.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
            with pytest.raises(RunFailure, match="step 1: the gradient is not finite"):
                model.optim_step()


def test_commands_call_the_same_functions(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise UserError("called")

    monkeypatch.setattr("dist_peft.app.commands.merge.merge_run", refuse)
    monkeypatch.setattr("dist_peft.app.commands.export.export_run", refuse)
    monkeypatch.setattr("dist_peft.app.training_run.load_with_adapter", refuse)
    assert cli.main(["merge", "--run", "run", "--out", "out"]) == 2
    assert cli.main(["export", "--run", "run", "--out", "out", "--format", "peft"]) == 2
    with pytest.raises(UserError, match="called"):
        train(tiny_tree(workspace))


def test_the_import_is_lazy() -> None:
    code = (
        "import sys, dist_peft; assert dist_peft.__all__; "
        "print([n for n in ('torch', 'transformers', 'pydantic') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = dist_peft.lod  # type: ignore[attr-defined]
