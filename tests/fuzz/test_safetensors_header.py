"""Any header or index: the tensors that the reference implementation finds, or a ``UserError``."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dist_peft.store.format import DTYPES, read_tensor_infos
from dist_peft.store.index import INDEX_NAME, SafetensorsIndex
from tests.fuzz.budget import fuzz, try_input
from tests.fuzz.strategies import damaged_bytes, damaged_tree, values

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(3, dtype=torch.bfloat16)}
RIGHT = save(TENSORS, {"format": "pt"})
LENGTH = int.from_bytes(RIGHT[:8], "little")
HEADER: dict[str, Any] = json.loads(RIGHT[8 : 8 + LENGTH])
DATA = RIGHT[8 + LENGTH :]
WORDS = ("dtype", "shape", "data_offsets", "F32", "BF16", "U8", "__metadata__", "a", *DTYPES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def check(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    infos, refusal = try_input(lambda: read_tensor_infos(file))
    if refusal is not None:
        assert str(file) in refusal
        return
    found = {
        i.name: (DTYPES_BACK[i.dtype], list(i.shape), content[i.start : i.stop]) for i in infos
    }
    reference = {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for name, entry in safetensors.deserialize(content)
    }
    assert found == reference


DTYPES_BACK = {dtype: code for code, dtype in DTYPES.items()}


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + DATA


def test_undamaged(file: Path) -> None:
    check(file, RIGHT)
    assert len(read_tensor_infos(file)) == 2


@fuzz
@given(content=st.binary(max_size=64) | damaged_bytes(RIGHT))
def test_bytes(file: Path, content: bytes) -> None:
    check(file, content)


@fuzz
@given(header=damaged_tree(HEADER, WORDS) | values(*WORDS))
def test_header(file: Path, header: Any) -> None:
    check(file, with_header(header))


SHARDS = {"a": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}


@fuzz
@given(
    tree=damaged_tree({"metadata": {}, "weight_map": SHARDS}, ("weight_map", *SHARDS.values(), "a"))
    | values("weight_map", "..", "/etc/passwd")
)
def test_index(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    directory = tmp_path_factory.getbasetemp() / "sharded"
    if not directory.exists():
        directory.mkdir()
        for name, shard in SHARDS.items():
            (directory / shard).write_bytes(save({name: TENSORS[name]}))
    (directory / INDEX_NAME).write_text(json.dumps(tree))
    index, refusal = try_input(lambda: SafetensorsIndex.open(directory))
    if refusal is not None:
        assert INDEX_NAME in refusal
        return
    assert {name: info.file.name for name, info in index.tensors.items()} == {
        name: SHARDS[name] for name in tree["weight_map"]
    }
