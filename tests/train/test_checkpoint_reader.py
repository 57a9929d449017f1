"""Metadata is read like torch does, and nothing else is."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_peft.core.errors import UserError
from dist_peft.train.checkpoint_reader import CheckpointReader, TensorLoadPlanner


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


class MakesDirectory:
    """What a stranger would put into an entry: it runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


def test_entry_of_bytes_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that says it is bytes reaches ``torch.load(weights_only=False)`` by torch's way."""
    monkeypatch.chdir(tmp_path)
    dcp.save({"a": MakesDirectory()}, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(UserError, match="entry 'a' is BytesStorageMetadata, not a tensor"):
        CheckpointReader("evil").read_metadata()
    with pytest.raises(dcp.api.CheckpointException, match="not a tensor"):
        dcp.load({"a": torch.zeros(1)}, storage_reader=CheckpointReader("evil"), no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match="stored as bytes"):
        dcp.load({"a": 1}, checkpoint_id="evil", planner=TensorLoadPlanner(), no_dist=True)
    assert not Path("owned").exists()
    dcp.load({"a": 1}, checkpoint_id="evil", no_dist=True)  # torch's own way: the attack is real
    assert Path("owned").exists()


def _rewrite(checkpoint: Path, **changes: object) -> None:
    """Give the only tensor's storage record other values."""
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    ((index, stored),) = metadata.storage_data.items()
    metadata.storage_data = {index: replace(stored, **changes)}
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp", "..", ""])
def test_tensor_outside_of_the_directory_is_refused(checkpoint: Path, name: str) -> None:
    _rewrite(checkpoint, relative_path=name)
    with pytest.raises(UserError, match=r"no name of a file in the checkpoint's own directory"):
        CheckpointReader(checkpoint).read_metadata()


def test_transformed_tensor_is_refused(checkpoint: Path) -> None:
    _rewrite(checkpoint, transform_descriptors=["stream.zstd"])
    with pytest.raises(UserError, match="is stored transformed"):
        CheckpointReader(checkpoint).read_metadata()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_links_and_pipes_are_refused(checkpoint: Path, name: str) -> None:
    """A link would read what the caller may read, a pipe would block for ever."""
    (checkpoint / name).rename(checkpoint / "kept")
    (checkpoint / name).symlink_to(checkpoint / "kept")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        CheckpointReader(checkpoint).read_metadata()
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        CheckpointReader(checkpoint).read_metadata()


def test_tensor_larger_than_its_file_is_refused(checkpoint: Path) -> None:
    """Before memory is allocated for it."""
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    entry = metadata.state_dict_metadata["a"]
    metadata.state_dict_metadata["a"] = replace(entry, size=torch.Size([10**9, 10**3]))
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="describes 4000000000000 bytes of tensors"):
        CheckpointReader(checkpoint).read_metadata()
