"""Metadata is read like torch does, and nothing else is."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_peft.core.errors import UserError
from dist_peft.train.checkpoint_reader import CheckpointReader


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save({"a": torch.arange(6.0).view(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_same_as_torch(checkpoint: Path) -> None:
    ours = CheckpointReader(checkpoint).read_metadata()
    theirs = dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    state = {"a": torch.zeros(2, 3)}
    dcp.load(state, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    assert torch.equal(state["a"], torch.arange(6.0).view(2, 3))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


def test_harmful_metadata_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"mkdir, which checkpoint metadata never contains"):
        CheckpointReader(checkpoint).read_metadata()
    assert not Path("owned").exists()
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="holds no checkpoint metadata"):
        CheckpointReader(checkpoint).read_metadata()
