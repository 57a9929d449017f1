import shutil
from pathlib import Path

import pytest

from dist_peft.app.commands.inspect import describe_path
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from tests.support.tiny_runs import save_base, tiny_tree


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect")
    assert train_from_config(parse_config(tiny_tree(directory)), World()) == 0
    close_log()
    return directory / "run"


def test_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    index = SafetensorsIndex.open(base)
    text = "\n".join(describe_path(base))
    assert "llama LlamaForCausalLM" in text
    numbers = sum(i.stop - i.start for i in index.tensors.values()) // 4
    assert f"{numbers:,} in {len(index.tensors)} tensors" in text
    assert f"{len(index.tensors)} x float32" in text
    assert index.compute_fingerprint() in text
    alone = "\n".join(describe_path(base / "model.safetensors"))
    assert alone.startswith("safetensors file ") and f"{numbers:,}" in alone and "type" not in alone


def test_run_with_its_checkpoints_and_adapter(run_dir: Path) -> None:
    text = "\n".join(describe_path(run_dir))
    assert text.startswith(f"run {run_dir}\n  state        finished at step 3, ")
    assert "\n  steps        3, last loss " in text
    assert "step-000002" in text and "step-000003" in text
    assert "LORA r=4 alpha=8 rslora=False dora=False" in text
    assert "  tensors      28 entries (--json)\n" in text
    assert max(map(len, text.splitlines())) < 200  # the record of a checkpoint has 150 values


def test_checkpoint(run_dir: Path) -> None:
    lines = describe_path(run_dir / "checkpoints" / "step-000003")
    assert lines[0] == f"checkpoint {run_dir / 'checkpoints' / 'step-000003'}"
    assert "  step         3" in lines and "  samples      6" in lines


def test_adapter(run_dir: Path) -> None:
    text = "\n".join(describe_path(run_dir / "adapter"))
    sizes = {"q": 128, "k": 96, "v": 96, "o": 128, "gate": 168, "up": 168, "down": 168}
    assert f"{2 * 4 * sum(sizes.values()):,} in 28 tensors" in text  # 2 layers, r = 4, in + out
    assert "q_proj" in text and "base_fingerprint" in text


def test_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none cannot be read: No such file"):
        describe_path(tmp_path / "none")
    with pytest.raises(UserError, match=r"is no base .*, adapter .*, run .*checkpoint"):
        describe_path(tmp_path)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        describe_path(base)


def test_adapter_directory_that_lost_its_files(run_dir: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json .*No such file"):
        describe_path(run)


def test_place_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        describe_path(tmp_path)
