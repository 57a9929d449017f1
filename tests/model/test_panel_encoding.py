"""Weights read and quantized panel by panel: the bytes of one whole pass, for any threads."""

from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear, StackPiece
from dist_peft.model.panel_encoding import (
    LOAD_MEMORY,
    PanelEncoder,
    _split_into_panels,
    count_load_threads,
)
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import Codec, RawCodec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.packed_rows import count_chunk_rows
from dist_peft.store.content import RowHashes, RowLayout
from dist_peft.store.format import TensorSpec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")
ROWS, COLUMNS = 203, 96


@pytest.fixture
def weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A bf16 matrix in a file, of which a panel has 16 rows."""
    monkeypatch.setattr("dist_peft.quant.packed_rows.CHUNK_ELEMENTS", 20 * COLUMNS)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    save_file({"w": weight}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return weight


def linear(codec: Codec) -> FrozenLinear:
    return FrozenLinear(COLUMNS, ROWS, codec, False, torch.bfloat16, "w", "meta")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("codec", [Nf4Codec(32), AffineCodec(3, 32)], ids=["nf4", "int3"])
def test_panels_are_the_rows_of_the_whole(
    codec: Codec, threads: int, weight: torch.Tensor, tmp_path: Path
) -> None:
    """Each byte is read once, at most a panel at a time; so is the hash of the whole."""
    wanted = codec.quantize_to_packed(weight)
    spec = TensorSpec("w", torch.bfloat16, (ROWS, COLUMNS))
    hashes = RowHashes([spec])
    before = torch.get_num_threads()
    with (
        RowReader(SafetensorsIndex.open(tmp_path), hashes) as reader,
        PanelEncoder(reader, CPU, threads) as encoder,
    ):
        assert torch.equal(encoder.encode_rows(linear(codec), Span(0, ROWS)), wanted)
        assert reader.bytes_read == weight.nbytes
        assert reader.largest_read == 16 * 2 * COLUMNS
        for span in (Span(7, 90), Span(100, 101), Span(5, 5)):
            assert torch.equal(encoder.encode_rows(linear(codec), span), wanted[span.slice])
    assert torch.get_num_threads() == before
    with RowReader(SafetensorsIndex.open(tmp_path), RowHashes([spec])) as whole:
        whole.read_rows("w")
        assert whole.hashes is not None
        assert hashes.sums["w"].is_complete
        assert hashes.sums["w"].total == whole.hashes.sums["w"].total


def test_rows_that_stay_as_they_are_are_read_at_once(weight: torch.Tensor, tmp_path: Path) -> None:
    with (
        RowReader(SafetensorsIndex.open(tmp_path)) as reader,
        PanelEncoder(reader, CPU, 2) as encoder,
    ):
        rows = encoder.encode_rows(linear(RawCodec()), Span(3, ROWS))
        assert torch.equal(rows.view(torch.bfloat16), weight[3:])
        assert reader.largest_read == weight[3:].nbytes


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bad_row_of_a_late_panel_is_an_error(
    threads: int, weight: torch.Tensor, tmp_path: Path
) -> None:
    weight[150, 5] = float("nan")
    save_file({"w": weight}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        RowReader(SafetensorsIndex.open(tmp_path)) as reader,
        PanelEncoder(reader, CPU, threads) as encoder,
        pytest.raises(UserError, match="tensor w: weight is not finite"),
    ):
        encoder.encode_rows(linear(Nf4Codec()), Span(0, ROWS))


@pytest.mark.parametrize("columns", [64, 1024, 2816, 8192, 28672, 2**20])
def test_no_hashed_block_is_in_two_panels(columns: int) -> None:
    """For files of 2 and 4 bytes a number: else the borders would be read twice."""
    for dtype in (torch.bfloat16, torch.float32):
        block = RowLayout.of_tensor(TensorSpec("w", dtype, (10**6, columns))).block_rows
        panels = list(_split_into_panels(Span(1001, 3001), count_chunk_rows(columns, CPU)))
        assert panels[0].start == 1001 and panels[-1].stop == 3001
        for one, other in pairwise(panels):
            assert one.stop == other.start and one.stop % block == 0
        assert max(map(len, panels)) * columns <= max(2**18, columns)


@pytest.mark.parametrize("memory", [2**20, 3 * 200 * COLUMNS * 2])
def test_transposed_weights_are_read_in_large_panels(
    memory: int, weight: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of some columns of the file passes over all of its rows."""
    monkeypatch.setattr("dist_peft.model.panel_encoding._COLUMN_MEMORY", memory)
    save_file({"w": weight.T[None].contiguous()}, tmp_path / "model.safetensors")
    stack = ExpertStack(1, COLUMNS, ROWS, Nf4Codec(32), "w", "meta")
    stack.pieces, stack.is_transposed = (StackPiece("w", Span(0, ROWS)),), True
    with (
        RowReader(SafetensorsIndex.open(tmp_path)) as reader,
        PanelEncoder(reader, CPU, 3) as encoder,
    ):
        packed = encoder.encode_rows(stack, Span(0, ROWS))
        assert torch.equal(packed, Nf4Codec(32).quantize_to_packed(weight))
        panels = 1 if memory == 2**20 else 2  # of 256 or 128 rows, not of 16
        assert reader.bytes_read == weight.nbytes
        assert panels * weight.nbytes * 0.98 < weight.nbytes + reader.bytes_skipped
        assert weight.nbytes + reader.bytes_skipped <= panels * weight.nbytes


def test_threads_are_this_ranks_share_of_the_cores() -> None:
    with mock.patch("os.sched_getaffinity", return_value=set(range(12)), create=True):
        assert [count_load_threads(n, CPU) for n in (1, 3, 8, 64)] == [8, 4, 1, 1]
        assert count_load_threads(1, torch.device("cuda", 0)) == 2
        assert LOAD_MEMORY == 64 * 2**20
