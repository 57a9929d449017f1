"""Chains of hashes that runs write; ``test_chain_check`` has their checks."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dist_peft.app.run_chain import hash_base_files
from dist_peft.core.world import World
from dist_peft.train.state_chain import CHAIN_FILE, read_chain
from tests.support.story_runs import train
from tests.support.tiny_runs import tiny_tree


def test_a_stopped_run_has_the_states_of_an_uninterrupted_one(tmp_path: Path) -> None:
    chains = []
    for name, stop in (("whole", None), ("cut", 1)):
        tree = tiny_tree(
            tmp_path,
            train__exact=True,
            save={"dir": str(tmp_path / name), "every": 2, "keep": 4},
        )
        if stop:
            assert train(World(), tree, stop) == 75
        assert train(World(), tree) == 0
        chain = read_chain(tmp_path / name / "adapter")
        assert chain is not None and chain.find_break() is None
        chains.append({link.step: link for link in chain.links})
    whole, cut = chains
    assert list(whole) == [2, 3] and list(cut) == [1, 2, 3]
    for step in whole:
        assert whole[step].state == cut[step].state and whole[step].hash != cut[step].hash
    assert whole[3].records == cut[3].records != cut[2].records


def test_other_runs_have_none(tmp_path: Path) -> None:
    assert train(World(), tiny_tree(tmp_path)) == 0
    assert not list(tmp_path.rglob(CHAIN_FILE))


def test_base_files_are_hashed_by_name(tmp_path: Path) -> None:
    for name in ("a.safetensors", "config.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    index = SimpleNamespace(tensors={"t": SimpleNamespace(file=tmp_path / "a.safetensors")})
    assert hash_base_files(cast(Any, index), tmp_path, World()) == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.safetensors", "config.json")
    }
