"""``inspect --json``: the same facts as the text, as data."""

import json
from pathlib import Path

import pytest

from dist_peft.app.cli import main
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.inspect_json import collect_facts, detect_path_kind
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from tests.support.tiny_runs import tiny_tree


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect_json")
    tree = tiny_tree(directory, train__steps=2)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    return directory / "run"


def test_kinds(run_dir: Path, tmp_path: Path) -> None:
    assert detect_path_kind(run_dir) == "run"
    assert detect_path_kind(run_dir / "checkpoints" / "step-000002") == "checkpoint"
    assert detect_path_kind(run_dir / "adapter") == "adapter"
    assert detect_path_kind(run_dir.parent / "base") == "base"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no base"):
        detect_path_kind(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        detect_path_kind(tmp_path / "none")


def test_base(run_dir: Path) -> None:
    base = run_dir.parent / "base"
    index = SafetensorsIndex.open(base)
    found = collect_facts(base)
    assert found["config"] == json.loads((base / "config.json").read_text())
    assert found["fingerprint"] == index.compute_fingerprint()
    assert found["bytes"] == 4 * found["numbers"] and found["dtypes"] == {
        "float32": found["tensors"]
    }
    assert collect_facts(base / "model.safetensors")["config"] is None


def test_run_and_its_parts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "run" and found["state"]["state"] == "finished"
    assert found["steps"] == 2 and found["last_loss"] > 0 and found["tasks"] == {}
    assert [Path(at["path"]).name for at in found["checkpoints"]][-1] == "step-000002"
    assert found["checkpoints"][-1]["step"] == 2
    adapter = found["adapter"]
    assert adapter == json.loads(json.dumps(collect_facts(run_dir / "adapter"), default=str))
    assert adapter["method"].startswith("LORA r=4") and adapter["not_read"] is None
    assert adapter["config"]["peft_type"] == "LORA" and adapter["tensors"] == 28
    assert adapter["dist_peft"]["base_fingerprint"]
