"""``dist-peft inspect`` of an exact run: a byte that was changed anywhere is found."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dist_peft.app import cli
from dist_peft.app.chain_check import check_adapter_chain, check_run_chain, describe_chain
from dist_peft.core.errors import AuditError
from tests.support.audited_runs import (
    change_weight,
    copy_run,
    exact_run,
    flip_byte,
    forge_chain,
    forge_state,
)

CHANGED = {
    "adapter/adapter_model.safetensors": "was changed",
    "adapter/adapter_config.json": "was changed",
    "adapter/dist_peft.json": "was changed",
    "checkpoints/step-000002/__0_0.distcp": "checksum of __0_0.distcp",
    "checkpoints/step-000004/run.json": "checksum of run.json",
    "checkpoints/step-000004/base.json": "checksum of base.json",
    "checkpoints/step-000004/chain.json": "checksum of chain.json",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_run(tmp_path_factory.mktemp("audit"))


def test_an_intact_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = check_run_chain(run_dir)
    assert chain is not None and [link.step for link in chain.links] == [2, 4]
    assert cli.main(["inspect", str(run_dir)]) == 0
    assert f"chain        {describe_chain(chain)}" in capsys.readouterr().out
    for part in ("adapter", "checkpoints/step-000002"):
        assert cli.main(["inspect", str(run_dir / part)]) == 0
        assert "chain        intact" in capsys.readouterr().out
    assert cli.main(["inspect", "--json", str(run_dir / "adapter")]) == 0
    assert json.loads(capsys.readouterr().out)["chain"]["adapter_hash"] == chain.adapter_hash


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_byte_is_found(
    run_dir: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_run(run_dir, tmp_path)
    file = copy / name
    # whitespace at the end of JSON is another file with the same meaning
    file.write_text(file.read_text() + "\n") if file.suffix == ".json" else flip_byte(file)
    for path in (copy, file.parent):
        assert cli.main(["inspect", str(path)]) == 4
        error = capsys.readouterr().err.splitlines()[-1]
        assert CHANGED[name] in error or "bytes, not" in error
        assert file.parent.name in error


def test_a_changed_loss_is_found(run_dir: Path, tmp_path: Path) -> None:
    metrics = copy_run(run_dir, tmp_path) / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    last = json.loads(others[-1])
    last["loss"] += 1e-12
    metrics.write_text("\n".join([first, *others[:-1], json.dumps(last)]) + "\n")
    with pytest.raises(AuditError, match=r"metrics\.jsonl: losses, .* of steps 3 to 4 are not"):
        check_run_chain(metrics.parent)


def test_checksums_that_fit_do_not_help(run_dir: Path, tmp_path: Path) -> None:
    """Whoever changes a checkpoint together with its checksums breaks the chain; who computes the
    chain again as well is found by a replay."""
    copy = copy_run(run_dir, tmp_path)
    forge_state(copy / "checkpoints" / "step-000004")
    with pytest.raises(AuditError, match=r"step-000004: parameters or moments are not those"):
        check_run_chain(copy)
    forge_chain(copy)
    chain, true = check_run_chain(copy), check_run_chain(run_dir)
    assert chain is not None and true is not None and chain.last_hash != true.last_hash


def test_files_that_are_missing_or_new_are_named(run_dir: Path, tmp_path: Path) -> None:
    adapter = copy_run(run_dir, tmp_path) / "adapter"
    (adapter / "more.json").write_text("{}")
    with pytest.raises(AuditError, match=r"more\.json is not of the run"):
        check_adapter_chain(adapter)
    (adapter / "more.json").unlink()
    (adapter / "dist_peft.json").unlink()
    with pytest.raises(AuditError, match=r"dist_peft\.json is missing"):
        check_adapter_chain(adapter)
    (adapter / "chain.json").unlink()
    with pytest.raises(AuditError, match=r"chain\.json is missing"):
        check_run_chain(adapter.parent)


def test_a_checkpoint_of_another_run_is_found(run_dir: Path, tmp_path: Path) -> None:
    copy = copy_run(run_dir, tmp_path)
    other = exact_run(tmp_path, train__seed=1)
    shutil.rmtree(copy / "adapter")
    shutil.copytree(other / "adapter", copy / "adapter")
    with pytest.raises(AuditError, match=re.escape("adapter/chain.json does not continue")):
        check_run_chain(copy)
    change_weight(copy / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AuditError, match=r"adapter_model\.safetensors was changed"):
        check_run_chain(copy)
