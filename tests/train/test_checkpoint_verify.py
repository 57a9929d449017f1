"""Damage at many places of checkpoints of 1, 2 and 3 ranks, sharded and replicated."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_files import (
    format_checksum_record,
    hash_file,
    read_checksum_record,
)
from dist_peft.train.checkpoint_verify import find_checkpoint_damage
from tests.support.checkpoints import make_position, make_sharded_state, make_whole_state
from tests.support.dist import run_ranks


def save_both_forms(world: World, directory: Path) -> list[str | None]:
    """Save state as fsdp2 has it (sharded) and as zero has it (whole on every rank)."""
    found = []
    for name, asynchronous in (("fsdp2", True), ("zero", False)):
        state = make_sharded_state(world, 1) if name == "fsdp2" else make_whole_state(1)
        checkpoints = CheckpointManager(directory / name, 2, world, asynchronous=asynchronous)
        with checkpoints.writes_finished():
            path = checkpoints.save_checkpoint(state, make_position(1), {"base.json": "{}"})
        found.append(find_checkpoint_damage(path, world))
    return found


def resume_with_damage(world: World, directory: Path) -> tuple[str, str]:
    checkpoints = CheckpointManager(directory, 3, world)
    chosen = checkpoints.select_checkpoint("auto")
    assert chosen is not None
    with pytest.raises(UserError) as caught:
        checkpoints.select_checkpoint(str(directory / "step-000002"))
    return chosen.name, str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_damage_is_found_wherever_it_is(tmp_path: Path, ranks: int) -> None:
    for found in run_ranks(save_both_forms, ranks, tmp_path):
        assert found == [None, None]
    for form in ("fsdp2", "zero"):
        path = tmp_path / form / "step-000001"
        files = sorted(file for file in path.iterdir())
        assert len(files) == ranks + 4
        tested = 0
        for file in files:
            data = file.read_bytes()
            for place in sorted({*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}):
                if place < 0:
                    continue  # a rank to which no tensor was assigned has an empty file
                flipped = bytearray(data)
                flipped[place] ^= 1 << (place % 8)
                file.write_bytes(flipped)
                damage = find_checkpoint_damage(path, World())
                assert damage is not None, f"{file} byte {place}"
                tested += 1
            file.write_bytes(data[:-1])
            assert not data or find_checkpoint_damage(path, World()) is not None
            file.unlink()
            assert find_checkpoint_damage(path, World()) is not None, file
            file.write_bytes(data)
        assert tested > 150
        assert find_checkpoint_damage(path, World()) is None
    if ranks > 1:
        run_dir = tmp_path / "fsdp2"
        position = make_position(2)
        state = make_whole_state(2)
        damaged = CheckpointManager(run_dir, 3, World()).save_checkpoint(state, position)
        shard = damaged / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
        for chosen, message in run_ranks(resume_with_damage, ranks, run_dir):
            assert chosen == "step-000001"
            assert f"checkpoint {damaged} is damaged: the checksum of __0_0" in message


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, 1, World())
    path = checkpoints.save_checkpoint(make_whole_state(1), make_position(1))
    (path / "files.json").unlink()
    assert find_checkpoint_damage(path, World()) == "files.json is missing"
    tree = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**tree, "format": 2}))
    assert find_checkpoint_damage(path, World()) is None
    assert checkpoints.select_checkpoint("auto") == path
    read = checkpoints.read_whole_tensors(path, ["param/a"])
    assert torch.equal(read["param/a"], make_whole_state(1)["param/a"])
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    assert "bytes of tensors" in str(find_checkpoint_damage(path, World()))


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, 2, World())
    checkpoints.save_checkpoint(make_whole_state(1), make_position(1))
    path = checkpoints.save_checkpoint(make_whole_state(2), make_position(2))
    tree = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**tree, "format": 5}))
    record = read_checksum_record(path)
    assert record is not None
    record["run.json"] = hash_file(path / "run.json")
    (path / "files.json").write_text(format_checksum_record(record))
    with pytest.raises(UserError, match="has format 5"):
        checkpoints.select_checkpoint("auto")
    shutil.rmtree(path)
    assert find_checkpoint_damage(path, World()) == "rank 0 does not see it"
