"""``store.base_record``: what is kept of a base, and how two are compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.errors import UserError
from dist_peft.store.base_record import BaseRecord

RECORD = BaseRecord(
    "some/base",
    "v2:1",
    {"rope_theta": 10000, "text": {"layers": 2}},
    {f"t{number}": f"2:{number:016x}" for number in range(6)},
)


def test_comes_back_from_json() -> None:
    about = json.loads(json.dumps({"kind": "full", **RECORD.to_metadata()}))
    assert BaseRecord.from_metadata(about, Path("x")) == RECORD
    assert about["base_content"]["id"] == RECORD.content_id


def test_of_an_earlier_version_or_of_peft() -> None:
    assert not BaseRecord.from_metadata({}, Path("x")).is_complete
    old = BaseRecord.from_metadata({"base": "b", "base_fingerprint": "0" * 64}, Path("x"))
    assert (old.path, old.is_complete, old.config) == ("b", False, None)
    assert not old.is_comparable(RECORD) and RECORD.describe_difference(old) is None


@pytest.mark.parametrize("tag", ["", "1:", "3:"])
def test_hashes_of_another_kind_are_none(tag: str) -> None:
    """They would name every tensor of the same base as one of other values."""
    about = RECORD.to_metadata()
    about["base_content"]["tensors"] = {"t1": f"{tag}{1:016x}", "t2": f"{tag}{2:016x}"}
    other = BaseRecord.from_metadata(about, Path("x"))
    assert not other.is_complete and other.fingerprint == RECORD.fingerprint
    assert RECORD.describe_difference(other) is None
    other.check_tensors(RECORD.tensors, "DIR", "adapter A", "fix it")


@pytest.mark.parametrize(
    "about",
    [
        {"base_fingerprint": 3},
        {"base_content": [1]},
        {"base_content": {"tensors": {"a": 1}}},
        {"base_content": {"tensors": [1]}},
        {"base_content": {"tensors": {"a": "2:" + "0" * 16, "b": "0" * 16}}},
        {"base_content": {"config": "x"}},
    ],
    ids=str,
)
def test_damaged(about: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"dist_peft\.json is damaged"):
        BaseRecord.from_metadata(about, Path("dist_peft.json"))


def test_tensors_that_differ_are_named() -> None:
    found = {**RECORD.tensors, "more": "f" * 16}
    RECORD.check_tensors(found, "DIR", "adapter A", "fix it")
    for name in ("t1", "t2", "t3"):
        found[name] = "f" * 16
    del found["t4"]
    with pytest.raises(UserError) as caught:
        RECORD.check_tensors(found, "DIR", "adapter A", "fix it")
    assert str(caught.value) == (
        "adapter A was trained on another base than DIR: 4 of 6 tensors hold other values: "
        "t1, t2, t3 and 1 more; it was some/base; fix it"
    )


def test_two_records() -> None:
    assert RECORD.describe_difference(RECORD) is None
    fewer = replace(RECORD, tensors={"t1": RECORD.tensors["t1"]}, fingerprint="v2:2")
    assert RECORD.describe_difference(fewer) is None  # a classifier does not use the head
    other = replace(RECORD, tensors={**RECORD.tensors, "t5": "0"})
    assert RECORD.describe_difference(other) == "1 of 6 tensors hold other values, such as t5"
    assert (
        RECORD.describe_difference(replace(RECORD, tensors={"x": "0"}))
        == "they have no tensor of one name"
    )
    deeper = replace(RECORD, config={"rope_theta": 10000, "text": {"layers": 3}})
    assert RECORD.describe_difference(deeper) == "in config.json text.layers is 3, was 2"
    bare = replace(RECORD, tensors={})
    assert (
        bare.describe_difference(replace(bare, fingerprint="v2:9")) == "their fingerprints differ"
    )
