"""The four states of a weight, and how it is cut into chunks."""

from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.merged_weights import MergedWeights, State
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import make_codec
from tests.support.export_runs import FakeRun, make_run

ENDS = ("model.embed_tokens.weight", "lm_head.weight")
INT4 = QuantConfig(kind="int", bits=4, group_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("walk"), INT4, group=32)


def rows(walk: MergedWeights, weight: BaseWeight) -> torch.Tensor:
    return torch.cat(
        [walk.read_merged_rows(weight, span).float() for span in walk.iterate_spans(weight)]
    )


@pytest.mark.parametrize("state", ["decoded", "codes"])
def test_trained_weights(state: State, run: FakeRun, tmp_path: Path) -> None:
    with run.job(tmp_path, chunk_bytes=2048).open_weights(state) as walk:
        assert [w.path for w in walk.weights if w.is_block_linear] == [
            n for n in walk.skeleton.index.tensors if "proj" in n
        ]
        for weight in walk.weights:
            wanted = run.trained[weight.name]
            torch.testing.assert_close(rows(walk, weight), wanted, rtol=1e-5, atol=1e-6)
        walk.check_all_consumed()


def test_base_and_original(run: FakeRun, tmp_path: Path) -> None:
    codec, files = AffineCodec(4, 32), load_file(run.directory / "model.safetensors")
    with (
        run.job(tmp_path).open_weights("base") as base,
        run.job(tmp_path).open_weights("original") as original,
        run.job(tmp_path).open_weights("decoded") as decoded,
    ):
        for weight in base.weights:
            plain = files[weight.name]
            if not weight.is_block_linear:
                assert torch.equal(rows(base, weight), plain)
                continue
            trained_on = codec.dequantize_rows(
                codec.quantize_to_packed(plain), weight.num_columns, torch.float32
            )
            assert torch.equal(rows(base, weight), trained_on)
            change = rows(original, weight) - plain
            torch.testing.assert_close(
                change, rows(decoded, weight) - trained_on, rtol=1e-3, atol=1e-6
            )
        base.check_all_consumed()


def test_adapter_that_was_not_used_up(run: FakeRun, tmp_path: Path) -> None:
    with run.job(tmp_path).open_weights() as walk, pytest.raises(UserError, match="another base"):
        walk.check_all_consumed()


def test_spans_have_whole_multiples(run: FakeRun, tmp_path: Path) -> None:
    with run.job(tmp_path, chunk_bytes=4 * 64 * 10).open_weights() as walk:
        weight = next(w for w in walk.weights if w.name.endswith("gate_proj.weight"))
        assert [len(s) for s in walk.iterate_spans(weight)] == [10] * 9 + [6]
        assert [len(s) for s in walk.iterate_spans(weight, 4)] == [8] * 12
        assert [len(s) for s in walk.iterate_spans(weight, 64)] == [64, 32]


def test_group_changes_are_the_adapter(run: FakeRun, tmp_path: Path) -> None:
    with run.job(tmp_path, chunk_bytes=2048).open_weights("base") as walk:
        found = torch.cat([change.flatten() for _, change in walk.iterate_group_changes()])
        wanted = [
            (run.trained[w.name] - rows(walk, w))[:, ::32].flatten()
            for w in walk.weights
            if w.is_block_linear
        ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-6)


PACKED_ENDS = {
    "nf4": QuantConfig(embeddings=True),
    "int4": INT4.model_copy(update={"embeddings": True}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", PACKED_ENDS)
def test_packed_ends_are_written_as_trained_except_in_original(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    quant = PACKED_ENDS[kind]
    run = make_run(tmp_path, quant, group=32, tie_word_embeddings=tied)
    files = load_file(run.directory / "model.safetensors")
    if tied:  # a second copy, which transformers ignores
        files["lm_head.weight"] = files["model.embed_tokens.weight"].clone()
        save_file(files, run.directory / "model.safetensors", {"format": "pt"})
    codec = make_codec(quant, torch.float32)
    for state in ("original", "decoded", "base", *(("codes",) if kind == "int4" else ())):
        with run.job(tmp_path).open_weights(cast(State, state)) as walk:
            ends = [w for w in walk.weights if w.path in ENDS]
            assert len(ends) == 2 and not any(w.is_block_linear for w in ends)
            for weight in ends:
                plain = files[weight.name]
                packed = codec.quantize_to_packed(plain)
                trained = codec.dequantize_rows(packed, weight.num_columns, torch.float32)
                expected = plain if state == "original" else trained
                assert torch.equal(rows(walk, weight), expected), (state, weight.path)
                assert not walk.is_packable(weight)
