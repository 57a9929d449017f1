import hashlib
from pathlib import Path

import pytest
import torch

from dist_peft.core.world import World
from dist_peft.train import checkpoint_hash
from dist_peft.train.checkpoint import CheckpointManager, RunPosition
from dist_peft.train.checkpoint_hash import hash_checkpoint_state


def test_hash_is_of_names_types_shapes_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"param/{n}": torch.randn(3, 5, generator=generator) for n in "bac"}
    state |= {"exp_avg/a": torch.ones(0, 4), "exp_avg/b": torch.randn(7).double()}
    manager = CheckpointManager(tmp_path, 2, World())
    path = manager.save_checkpoint(dict(state), RunPosition(1, 2, 0, "b", {"x": 1}))
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert hash_checkpoint_state(path) == digest.hexdigest()
    monkeypatch.setattr(checkpoint_hash, "_PART_BYTES", 100)  # one or two tensors at a time
    assert hash_checkpoint_state(path) == digest.hexdigest()
    state["param/c"] = state["param/c"].nextafter(torch.tensor(torch.inf))
    other = manager.save_checkpoint(dict(state), RunPosition(2, 4, 0, "b", {"x": 1}))
    assert hash_checkpoint_state(other) != digest.hexdigest()
