"""AWQ's words against nibbles put in their places one by one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.span import Span
from dist_peft.export.formats.awq import AwqPacker
from dist_peft.export.formats.registry import export_model
from dist_peft.export.model_directory import TensorPiece
from dist_peft.quant.affine import AffineCodec
from tests.support.export_runs import FakeRun, make_run
from tests.support.packed import awq_words
from tests.support.prequantized_models import load

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("awq"), QuantConfig(kind="int", group_size=32))


def test_words_have_outputs_in_awqs_order(run: FakeRun, tmp_path: Path) -> None:
    """Chunks of rows come one after the other; a weight's tensors are whole at the last."""
    codec = AffineCodec(4, 32)
    packer = AwqPacker(codec, torch.float32)
    with run.job(tmp_path).open_weights("base") as walk:
        [weight] = [w for w in walk.weights if w.name == WEIGHT]
        pieces: list[TensorPiece] = []
        for span in Span(0, weight.num_rows).split_into_chunks(32):
            pieces += packer.pack_rows(walk, weight, span)
        planned = {spec.name: spec for spec in packer.plan_tensors(weight)}
    assert {p.name for p in pieces} == planned.keys() and len(pieces) == 3
    rows = load_file(run.directory / "model.safetensors")[WEIGHT].float()
    parts = codec.split_packed_rows(codec.quantize_to_packed(rows), rows.shape[1])
    stem = WEIGHT.removesuffix(".weight")
    wanted = {
        f"{stem}.qweight": awq_words(parts.codes.T),
        f"{stem}.qzeros": awq_words(parts.zero.T),
        f"{stem}.scales": parts.scale.T,
    }
    for piece in pieces:
        assert torch.equal(piece.rows, wanted[piece.name]) and piece.start == 0
        assert tuple(piece.rows.shape) == planned[piece.name].shape


def test_a_plain_merge_is_decoded_to_its_rows(run: FakeRun, tmp_path: Path) -> None:
    """By the reader of AWQ bases and by the description of the format, element by element."""
    exported = export_model("awq", run.job(tmp_path / "out", group_size=32))
    assert not exported.exact and exported.written.packed == 14
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    merged = run.job(tmp_path)
    stem = WEIGHT.removesuffix(".weight")
    with merged.open_weights("original") as walk:
        [weight] = [w for w in walk.weights if w.name == WEIGHT]
        rows = walk.read_merged_rows(weight, Span(0, weight.num_rows))
    words, zeros = tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"]
    scales = tensors[f"{stem}.scales"].float()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for out, column in ((0, 0), (5, 17), (95, 63), (44, 33)):
        shift = 4 * order.index(out % 8)
        code = int(words[column, out // 8]) >> shift & 15
        zero = int(zeros[column // 32, out // 8]) >> shift & 15
        found = (code - zero) * float(scales[column // 32, out])
        assert abs(found - float(rows[out, column])) <= 0.51 * float(scales[column // 32, out])
    assert load(tmp_path / "out").prequantized is not None
