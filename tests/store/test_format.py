import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.store.format import DTYPES, TensorSpec, build_header, read_tensor_infos
from tests.support.store_files import (
    LIBRARY_DTYPES,
    entry,
    names,
    random_tensor,
    raw_bytes,
    tensors,
    write_raw,
)


def _specs(content: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in content.items()]


# -- what is right ---------------------------------------------------------------------------------


@given(tensors())
def test_header_equals_the_librarys(content: dict[str, Tensor]) -> None:
    header, infos = build_header(_specs(content), {"format": "pt"}, Path("f"))
    data = b"".join(raw_bytes(content[info.name]) for info in infos)
    assert header + data == save(content, {"format": "pt"})


def test_every_type_in_the_librarys_order() -> None:
    content = {f"t{i}": random_tensor(d, (3, 2), i) for i, d in enumerate(LIBRARY_DTYPES)}
    header, _ = build_header(_specs(content), {}, Path("f"))
    assert save(content).startswith(header)


@given(content=tensors())
def test_reads_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor]
) -> None:
    file = tmp_path_factory.mktemp("f") / "x.safetensors"
    save_file(content, file)
    whole = file.read_bytes()
    infos = read_tensor_infos(file)
    assert {info.name for info in infos} == content.keys()
    for info in infos:
        tensor = content[info.name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert whole[info.start : info.stop] == raw_bytes(tensor)
        assert info.num_bytes == info.stop - info.start == info.num_rows * info.row_bytes


def test_all_known_types_are_read(tmp_path: Path) -> None:
    for code, dtype in DTYPES.items():
        size = 2 * dtype.itemsize
        file = write_raw(tmp_path / code, {"t": entry(code, [2], 0, size)}, bytes(size))
        assert read_tensor_infos(file)[0].dtype == dtype


def test_rows_of_scalars_and_vectors() -> None:
    scalar = TensorSpec("s", torch.float32, ())
    assert (scalar.num_rows, scalar.row_bytes, scalar.num_bytes) == (1, 4, 4)
    vector = TensorSpec("v", torch.bfloat16, (7,))
    assert (vector.num_rows, vector.row_bytes, vector.num_bytes) == (7, 2, 14)
    empty = TensorSpec("e", torch.bfloat16, (7, 0, 3))
    assert (empty.num_rows, empty.row_bytes, empty.num_bytes) == (7, 0, 0)


# -- what is wrong ---------------------------------------------------------------------------------

F32 = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{", b"", "header is not valid JSON"),
        (b"\xff\xfe", b"", "header is not valid JSON"),
        (b"[" * 100_000, b"", "header is not valid JSON"),
        (b"[]", b"", "header is not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "two entries named a"),
        ({"__metadata__": []}, b"", "its __metadata__ is no object of texts"),
        ({"__metadata__": 0}, b"", "its __metadata__ is no object of texts"),
        ({"__metadata__": ""}, b"", "its __metadata__ is no object of texts"),
        ({"__metadata__": {"a": 1}}, b"", "its __metadata__ is no object of texts"),
        ({"t": 3}, b"", "tensor t lacks dtype, shape or data_offsets"),
        ({"t": {"dtype": "F32", "shape": []}}, b"", "tensor t lacks dtype"),
        ({"t": entry("F32", [-2], 0, 8)}, bytes(8), "tensor t has shape [-2]"),
        ({"t": entry("F32", [True], 0, 4)}, bytes(4), "tensor t has shape [True]"),
        ({"t": entry("F32", [2.0], 0, 8)}, bytes(8), "tensor t has shape [2.0]"),
        ({"t": entry("F32", 2, 0, 8)}, bytes(8), "tensor t has shape 2"),
        ({"t": entry("F32", [2], -8, 0)}, bytes(8), "tensor t has data_offsets [-8, 0]"),
        ({"t": entry("F32", [2], 8, 0)}, bytes(8), "tensor t has data_offsets [8, 0]"),
        ({"t": entry("F32", [2], 0)}, bytes(8), "tensor t has data_offsets [0]"),
        ({"t": entry("F32", [2], 0, "8")}, bytes(8), "tensor t has data_offsets [0, '8']"),
        ({"t": entry("F32", [3], 0, 8)}, bytes(8), "has 12 bytes, its data_offsets span 8"),
        ({"t": entry("F32", [10**30], 0, 8)}, bytes(8), "its data_offsets span 8"),
        ({"t": F32, "u": entry("U8", [4], 4, 8)}, bytes(8), "tensor u overlaps tensor t"),
        ({"t": F32, "u": F32}, bytes(8), "tensor u overlaps tensor t"),
        ({"t": entry("F32", [2], 4, 12)}, bytes(12), "4 bytes before tensor t belong to no"),
        ({"t": F32}, bytes(11), "3 bytes after tensor t belong to no tensor"),
        ({}, bytes(1), "1 bytes after the header belong to no tensor"),
    ],
)
def test_corrupt_files(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    file = write_raw(tmp_path / "f.safetensors", header, data)
    with pytest.raises(UserError) as caught:
        read_tensor_infos(file)
    assert f"file {file} is no valid safetensors file" in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({"t": F32}, None, "tensor t ends at byte"),
        ({}, 1000, "its header ends at byte 1,008, the file at 10"),
        ({}, 99_999_999, "its header ends at byte 100,000,007"),
    ],
)
def test_truncated_files(tmp_path: Path, header: Any, length: int | None, words: str) -> None:
    file = write_raw(tmp_path / "f.safetensors", header, length=length)
    with pytest.raises(UserError) as caught:
        read_tensor_infos(file)
    assert f"file {file} is truncated: {words}" in str(caught.value)
    assert "copy or download it again" in str(caught.value)


def test_every_truncation_of_a_real_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int8)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            read_tensor_infos(file)


def test_header_of_more_than_100_mb(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "f", {}, length=100_000_001)
    with pytest.raises(UserError, match="header would have 100,000,001 bytes, at most 100 MB"):
        read_tensor_infos(file)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"git-lfs pointer, not the data; run git lfs pull"):
        read_tensor_infos(file)


def test_unsupported_type_names_the_tensor(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "f", {"w": entry("F4", [4], 0, 2)}, bytes(2))
    with pytest.raises(UserError, match=r"tensor w in .*f has type F4, which is not supported"):
        read_tensor_infos(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_tensor_infos(tmp_path / "none.safetensors")


def test_header_of_an_unknown_type_or_the_reserved_name() -> None:
    with pytest.raises(ValueError, match="tensor t: safetensors has no type for"):
        build_header([TensorSpec("t", torch.complex128, ())], {}, Path("f"))
    with pytest.raises(ValueError, match="__metadata__ is no name for a tensor"):
        build_header([TensorSpec("__metadata__", torch.int8, ())], {}, Path("f"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names | st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(
    header=st.binary(max_size=30)
    | st.dictionaries(
        names,
        json_values
        | st.builds(
            entry,
            st.sampled_from(["U8", "F32", "X", 3]),
            st.lists(st.integers(-1, 4), max_size=2),
            st.integers(-1, 9),
            st.integers(-1, 9),
        ),
        max_size=3,
    ),
    data=st.binary(max_size=12),
)
def test_any_file_is_read_or_refused_with_a_message(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", text, data)
    try:
        infos = read_tensor_infos(file)
    except UserError:
        return
    end = 8 + len(text)
    for info in infos:
        assert info.start == end
        end = info.stop
    assert end == file.stat().st_size
