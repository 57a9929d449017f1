"""The probe at a resume: checked, computed again, or announced as missing."""

from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.export.verify import Probe
from tests.support.tiny_runs import tiny_tree, train


def test_damaged_probe_is_told_before_training_goes_on(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    assert train(tree) == 0
    (tmp_path / "run" / "probe.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"probe\.safetensors is damaged"):
        train({**tree, "train": {**tree["train"], "steps": 5}})


def test_missing_probe_is_computed_again_with_the_adapter_off(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    assert train(tree) == 0
    path = tmp_path / "run" / "probe.safetensors"
    first = Probe.load_probe(path)
    path.unlink()
    assert train({**tree, "train": {**tree["train"], "steps": 5}}) == 0
    again = Probe.load_probe(path)
    assert torch.equal(again.before, first.before)
    assert not torch.equal(again.trained, first.trained)


def test_missing_probe_of_a_base_that_is_gone_is_announced(tmp_path: Path) -> None:
    """Full fine-tuning keeps no base to compute it with."""
    tree = tiny_tree(tmp_path, adapter={"kind": "full"})
    assert train(tree) == 0
    (tmp_path / "run" / "probe.safetensors").unlink()
    assert train({**tree, "train": {**tree["train"], "steps": 4}}) == 0
    assert "exports cannot be verified" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "probe.safetensors").exists()
