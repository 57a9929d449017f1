import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest

from dist_peft.core.errors import UserError
from dist_peft.train.state_chain import (
    CHAIN_FILE,
    ChainLink,
    ChainOrigin,
    StateChain,
    hash_file_bytes,
    hash_records,
    read_chain,
)
from dist_peft.train.step_metrics import StepMetrics


def record(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step, loss, 0.1, 0.25, 7, tokens_per_s=step, mem_peak=1, bytes_gathered=2)


def link(step: int, state: str = "s") -> ChainLink:
    return ChainLink(step, "c", state, "r", {"run.json": "f"})


def chain_of(*steps: int) -> StateChain:
    chain = StateChain(ChainOrigin(0, {"model.safetensors": "b"}, "d"))
    for step in steps:
        chain = chain.add_link(link(step))
    return chain


def sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_each_hash_is_of_the_one_before_and_of_its_link() -> None:
    chain = chain_of(2, 4)
    expected = sha256({"step": 0, "base": {"model.safetensors": "b"}, "data": "d"})
    for found in chain.links:
        content = {k: v for k, v in dataclasses.asdict(found).items() if k != "hash"}
        expected = sha256([expected, content])
        assert found.hash == expected
    assert chain.last_hash == expected and chain.find_break() is None
    sealed = chain.add_adapter({"a.safetensors": "x"})
    assert sealed.adapter_hash == sha256([expected, {"a.safetensors": "x"}])


@pytest.mark.parametrize("field", ["config", "state", "records", "hash"])
def test_a_changed_link_is_found(field: str) -> None:
    chain = chain_of(2, 4, 6)
    for number in range(3):
        links = list(chain.links)
        links[number] = dataclasses.replace(links[number], **{field: "other"})
        found = dataclasses.replace(chain, links=tuple(links)).find_break()
        assert found is not None and f"step {2 + 2 * number} " in found


def test_changes_around_the_links_are_found() -> None:
    chain = chain_of(2, 4)
    other = ChainOrigin(0, {"model.safetensors": "b"}, "other")
    assert dataclasses.replace(chain, origin=other).find_break()
    assert dataclasses.replace(chain, links=chain.links[1:]).find_break()
    assert chain.add_link(link(4)).find_break() == "the link of step 4 follows that of 4"
    sealed = dataclasses.replace(chain.add_adapter({"a": "x"}), adapter={"a": "y"})
    assert sealed.find_break() == "the hashes of the adapter's files were changed"


def test_a_chain_extends_its_beginning_only() -> None:
    chain = chain_of(2, 4, 6)
    assert chain.extends(chain_of(2, 4)) and chain.extends(chain.cut_after(3))
    assert not chain.extends(chain_of(2, 5)) and not chain_of(2).extends(chain)
    assert [(first, found.step) for first, found in chain.list_spans()] == [(0, 2), (2, 4), (4, 6)]


def test_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_chain(tmp_path) is None
    chain = chain_of(2, 4).add_adapter({"a": "x"})
    (tmp_path / CHAIN_FILE).write_text(chain.to_json())
    assert read_chain(tmp_path) == chain
    for text in ("", "[]", '{"format": 2}', chain.to_json().replace("state", "stat"), "{"):
        (tmp_path / CHAIN_FILE).write_text(text)
        with pytest.raises(UserError, match=r"chain\.json is damaged"):
            read_chain(tmp_path)
    (tmp_path / CHAIN_FILE).write_text(chain.to_json() + "\n")
    with pytest.raises(UserError, match="not as it was written"):
        read_chain(tmp_path)


def test_records_are_hashed_by_their_bits() -> None:
    lines = "".join(f"[{step}, 1.5, 0.25, 0.1, 7]\n" for step in (1, 2))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert hash_records([record(1), record(2)]) == expected
    assert hash_records([record(1), record(2, math.nextafter(1.5, 2))]) != expected
    lost = [record(1, math.nan)]  # metrics.jsonl has no infinity, it reads back as NaN
    assert hash_records(lost) == hash_records([record(1, math.inf)])


def test_file_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file_bytes(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
