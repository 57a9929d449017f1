"""Any metadata of a checkpoint: found damaged, or as it was written; never run, never a crash."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.world import World
from dist_peft.store.base_record import BaseRecord
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_verify import find_checkpoint_damage, read_metadata
from dist_peft.train.run_position import read_position
from tests.fuzz.budget import fuzz, try_input
from tests.fuzz.strategies import damaged_bytes, damaged_tree, values
from tests.support.checkpoints import make_position, make_whole_state

WORDS = ("step", "samples", "seed", "base", "values", "format", "files", "bytes", "xxh3_128")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    manager = CheckpointManager(directory, 1, World(), asynchronous=False)
    manager.save_checkpoint(make_whole_state(2), make_position(2))
    (path,) = manager.list_published()
    return path


def check(checkpoint: Path, name: str, content: bytes, *, is_recorded: bool) -> None:
    """Replace one file; without the record of checksums its contents themselves are checked."""
    place = checkpoint.parent / "damaged" / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkpoint, place)
    (place / name).write_bytes(content)
    if not is_recorded:
        (place / "files.json").unlink()
    changed = content != (checkpoint / name).read_bytes()
    damage, refusal = try_input(lambda: find_checkpoint_damage(place, World()))
    assert damage is not None or refusal is not None or not changed or not is_recorded
    for read in (read_position, read_metadata):
        _, refusal = try_input(lambda read=read: read(place))
        assert refusal is None or str(place) in refusal


def test_undamaged(checkpoint: Path) -> None:
    assert find_checkpoint_damage(checkpoint, World()) is None


@fuzz
@given(data=st.data(), is_recorded=st.booleans())
def test_metadata(checkpoint: Path, data: st.DataObject, is_recorded: bool) -> None:
    right = (checkpoint / ".metadata").read_bytes()
    content = data.draw(damaged_bytes(right) | values(*WORDS).map(pickle.dumps))
    check(checkpoint, ".metadata", content, is_recorded=is_recorded)


@fuzz
@given(data=st.data(), is_recorded=st.booleans())
def test_position(checkpoint: Path, data: st.DataObject, is_recorded: bool) -> None:
    tree = json.loads((checkpoint / "run.json").read_text())
    tree |= {} if is_recorded else {"format": 2}
    damaged = data.draw(damaged_tree(tree, WORDS) | values(*WORDS))
    check(checkpoint, "run.json", json.dumps(damaged).encode(), is_recorded=is_recorded)


@fuzz
@given(data=st.data())
def test_checksums(checkpoint: Path, data: st.DataObject) -> None:
    right = (checkpoint / "files.json").read_bytes()
    tree = damaged_tree(json.loads(right), WORDS).map(lambda t: json.dumps(t, indent=1).encode())
    content = data.draw(damaged_bytes(right) | tree)
    check(checkpoint, "files.json", content, is_recorded=True)


@fuzz
@given(tree=values("base", "base_fingerprint", "base_content", "config", "tensors", "id"))
def test_record_of_the_base(tree: Any) -> None:
    about = tree if isinstance(tree, dict) else {"base": tree}
    _, refusal = try_input(lambda: BaseRecord.from_metadata(about, Path("dist_peft.json")))
    assert refusal is None or "dist_peft.json" in refusal
