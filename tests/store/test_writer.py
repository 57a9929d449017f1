import itertools
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter, TensorSpec, write_atomically
from tests.support.store_files import INDEX, raw_bytes, tensors

W = torch.arange(12.0).reshape(6, 2)
SPEC = TensorSpec("w", torch.float32, (6, 2))


def _specs(content: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in content.items()]


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_rows_of_a_stack_may_be_written_without_its_first_dimension(tmp_path: Path) -> None:
    spec, values = TensorSpec("w", torch.float32, (2, 3, 2)), torch.arange(12.0).view(2, 3, 2)
    with StreamWriter(tmp_path, [spec]) as writer:
        writer.write_rows("w", values.view(6, 2)[:2])
        writer.write_rows("w", values.view(6, 2)[2:3], 2)
        with pytest.raises(ValueError, match="was written before"):
            writer.write_rows("w", values[:1])
        with pytest.raises(ValueError, match="has no"):
            writer.write_rows("w", values.view(6, 2)[:2], 5)
        writer.write_rows("w", values[1:], 1)
    save_file({"w": values}, tmp_path / "other", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "other").read_bytes()


# -- what is written -------------------------------------------------------------------------------


@given(content=tensors())
def test_a_single_file_equals_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor]
) -> None:
    directory = tmp_path_factory.mktemp("out")
    with StreamWriter(directory, _specs(content)) as writer:
        for name, tensor in content.items():
            writer.write_rows(name, tensor)
    assert _names(directory) == ["model.safetensors"]
    assert writer.files == (directory / "model.safetensors",)
    reference = directory / "reference"
    save_file(content, reference, {"format": "pt"})
    assert writer.files[0].read_bytes() == reference.read_bytes()


@given(data=st.data(), content=tensors(), limit=st.integers(1, 200))
def test_any_order_of_spans_and_any_split_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    content: dict[str, Tensor],
    limit: int,
) -> None:
    directory = tmp_path_factory.mktemp("out") / "made" / "here"
    pieces = []
    for name, tensor in content.items():
        if not tensor.ndim:
            pieces.append((name, tensor, 0))
            continue
        cuts = data.draw(st.lists(st.integers(0, len(tensor)), max_size=4))
        for start, stop in itertools.pairwise(sorted({0, len(tensor), *cuts})):
            pieces.append((name, tensor[start:stop], start))
    with StreamWriter(directory, _specs(content), limit) as writer:
        for name, rows, start in data.draw(st.permutations(pieces)):
            writer.write_rows(name, rows, start)
    seen = {}
    for file in writer.files:
        with safe_open(file, "pt") as library:
            assert library.metadata() == {"format": "pt"}
            shard = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118
        assert len(shard) <= 1 or sum(t.nbytes for t in shard.values()) <= limit
        assert not seen.keys() & shard.keys()
        seen.update(shard)
    assert seen.keys() == content.keys()
    with RowReader(SafetensorsIndex.open(directory)) as reader:
        for name, tensor in content.items():
            assert raw_bytes(seen[name]) == raw_bytes(tensor) == raw_bytes(reader.read_rows(name))
            assert seen[name].shape == tensor.shape


def test_shards_and_index_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    content = {"b": torch.ones(4), "a": torch.zeros(4), "big": torch.ones(20), "c": torch.ones(1)}
    with StreamWriter(tmp_path, _specs(content), max_file_bytes=32) as writer:
        for name, tensor in content.items():
            writer.write_rows(name, tensor)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert _names(tmp_path) == [*shards, INDEX]
    assert [file.name for file in writer.files] == shards
    text = (tmp_path / INDEX).read_text()
    tree = {
        "metadata": {"total_size": 29 * 4},
        "weight_map": {"a": shards[0], "b": shards[0], "big": shards[1], "c": shards[2]},
    }
    assert text == json.dumps(tree, indent=2) + "\n"


def test_rows_may_be_strided_and_need_gradients(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(2, 6).T.requires_grad_()
    with StreamWriter(tmp_path, [SPEC]) as writer:
        writer.write_rows("w", rows)
    with safe_open(tmp_path / "model.safetensors", "pt") as library:
        assert torch.equal(library.get_tensor("w"), rows.detach())


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    with StreamWriter(tmp_path, [SPEC]) as writer:
        writer.write_rows("w", W)
        writer.close()
        assert _names(tmp_path) == ["model.safetensors"]
        with pytest.raises(ValueError, match="the writer is closed"):
            writer.write_rows("w", W)
    assert SafetensorsIndex.open(tmp_path).tensors.keys() == {"w"}


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with StreamWriter(tmp_path, [SPEC]) as writer:
            writer.write_rows("w", W)
        write_atomically(tmp_path / "x.json", "{}")
    finally:
        os.umask(before)
    for name in ("model.safetensors", "x.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_bounded_open_files(tmp_path: Path) -> None:
    specs = [TensorSpec(str(i), torch.uint8, (1,)) for i in range(40)]
    before = len(os.listdir("/proc/self/fd"))
    with StreamWriter(tmp_path, specs, max_file_bytes=1) as writer:
        for spec in specs:
            writer.write_rows(spec.name, torch.tensor([int(spec.name)], dtype=torch.uint8))
        assert len(os.listdir("/proc/self/fd")) - before <= 16
    assert len(os.listdir("/proc/self/fd")) == before
    with RowReader(SafetensorsIndex.open(tmp_path)) as reader:
        assert [int(reader.read_rows(str(i))) for i in range(40)] == list(range(40))


# -- each row exactly once -------------------------------------------------------------------------


def test_missing_rows(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path, [SPEC])
    writer.write_rows("w", W[:2])
    writer.write_rows("w", W[4:], 4)
    with pytest.raises(ValueError, match="tensor w: 2 of 6 rows were never written"):
        writer.close()
    assert _names(tmp_path) == []


def test_a_tensor_never_written(tmp_path: Path) -> None:
    scalar, empty = TensorSpec("s", torch.float32, ()), TensorSpec("e", torch.float32, (0, 3))
    with (
        pytest.raises(ValueError, match="tensor s: 1 of 1 rows were never written"),
        StreamWriter(tmp_path, [empty, scalar]),
    ):
        pass
    with StreamWriter(tmp_path, [empty]):
        pass  # nothing to write is all of it
    assert _names(tmp_path) == ["model.safetensors"]


@given(data=st.data())
def test_spans_written_are_remembered(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(0, 12))
    written: set[int] = set()
    spec = TensorSpec("w", torch.uint8, (rows,))
    writer = StreamWriter(tmp_path_factory.mktemp("out"), [spec])
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.integers(0, rows))
        span = Span(start, data.draw(st.integers(start, rows)))
        new = set(range(span.start, span.stop))
        if new & written:
            with pytest.raises(ValueError, match=r"some of Span.* was written before"):
                writer.write_rows("w", torch.zeros(len(span), dtype=torch.uint8), start)
        else:
            writer.write_rows("w", torch.zeros(len(span), dtype=torch.uint8), start)
            written |= new
    if len(written) == rows:
        writer.close()
    else:
        count = rows - len(written)
        with pytest.raises(ValueError, match=f"{count} of {rows} rows were never written"):
            writer.close()


@pytest.mark.parametrize(
    ("name", "rows", "start", "words"),
    [
        ("v", W, 0, "tensor v was not planned"),
        ("w", W.half(), 0, "tensor w has type torch.float32, not torch.float16"),
        ("w", W[:, :1], 0, r"tensor w has shape \(6, 2\), rows \(6, 1\)"),
        ("w", W[0], 0, r"tensor w has shape \(6, 2\), rows \(2,\)"),
        ("w", torch.tensor(1.0), 0, r"tensor w has shape \(6, 2\), rows \(\)"),
        ("w", W, 1, r"tensor w of shape \(6, 2\) has no Span\(start=1, stop=7\)"),
        ("s", torch.ones(1), 0, r"tensor s has shape \(\), rows \(1,\)"),
        ("s", torch.tensor(1.0), 1, r"tensor s of shape \(\) has no Span"),
    ],
)
def test_rows_that_do_not_fit(
    tmp_path: Path, name: str, rows: Tensor, start: int, words: str
) -> None:
    with (
        pytest.raises(ValueError, match=words),
        StreamWriter(tmp_path, [SPEC, TensorSpec("s", torch.float32, ())]) as writer,
    ):
        writer.write_rows(name, rows, start)
    assert _names(tmp_path) == []


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors have the same name"):
        StreamWriter(tmp_path, [SPEC, SPEC])
    with pytest.raises(ValueError, match="safetensors has no type for"):
        StreamWriter(tmp_path, [TensorSpec("w", torch.complex128, (1,))])
    assert _names(tmp_path) == []


def test_private_files_and_others(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        for name, private in (("a", True), ("b", False)):
            write_atomically(tmp_path / name, "text", private=private)
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
