"""Each key of other trainers leads to a key that exists here, with a value that is valid there."""

from pathlib import Path

import pytest

from dist_peft.core.config.io import load_config
from dist_peft.core.config.peer_keys import PEER_KEYS, PEER_PATHS, PeerKey, find_peer_key
from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.validation_messages import list_config_keys

ENTRIES = {**PEER_KEYS, **PEER_PATHS}
LEAST = "base: {path: model}\ndata: {train: [a.jsonl]}\n"
# The kind of adapter that has a key.
KINDS = {"adapter.parts": "partial", "adapter.init": "lora"}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_key_exists(name: str) -> None:
    assert name == name.lower() and "-" not in name
    peer = ENTRIES[name]
    if peer.key is None:
        assert peer.note and peer.value is None and not peer.is_copied
    else:
        assert peer.key in list_config_keys()
        assert not peer.is_needless


@pytest.mark.parametrize("name", [name for name, peer in ENTRIES.items() if peer.value])
def test_the_value_is_valid(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(LEAST)
    key, value = ENTRIES[name].key, ENTRIES[name].value
    assert key is not None
    overrides = [f"{key}={value}"]
    if key in KINDS:
        overrides = [f"adapter={{kind: {KINDS[key]}, {key.rpartition('.')[2]}: {value}}}"]
    assert load_config(tmp_path / "run.yaml", overrides)


def test_no_entry_hides_a_key_of_ours() -> None:
    """A name of the table may exist here, in another place; at that place it is no unknown key."""
    assert not set(PEER_PATHS) & set(list_config_keys())
    assert not set(PEER_KEYS) & set(RunConfig.model_fields)


def test_names_count_at_any_nesting_and_spelling() -> None:
    expected = PEER_KEYS["learning_rate"]
    assert expected == PeerKey("train.lr", is_copied=True)
    for path in ("learning_rate", "train.learning_rate", "a.b.Learning-Rate"):
        assert find_peer_key(path) == expected
    assert find_peer_key("stage") == PEER_PATHS["stage"]
    assert find_peer_key("train.stage") is None  # engine.stage by its name
    assert find_peer_key("save.steps") == PeerKey("save.every")
    assert find_peer_key("train.steps") is None


def test_descriptions() -> None:
    assert PeerKey("train.lr").describe() == "here it is train.lr"
    assert PeerKey("a.b", "c", "d").describe() == "here it is a.b: c (d)"
    assert PeerKey(note="d").describe() == "no key here: d"
