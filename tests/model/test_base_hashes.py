"""``model.base_hashes``: which tensors of a base are hashed, and in what form."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.span import Span
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.frozen_linear import FrozenLinear, WeightRows
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.content import RowLayout, hash_rows
from dist_peft.store.reader import RowReader
from tests.support import packed
from tests.support.tiny_models import MIXTURES, TRANSPOSED, save_model


def test_of_an_unquantized_base(tmp_path: Path) -> None:
    save_model(MIXTURES["qwen2_moe"], tmp_path)
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path)), tmp_path)
    assert build_row_hashes(skeleton).tensor_names == sorted(
        load_file(tmp_path / "model.safetensors")
    )


def test_packed_linears_count_as_their_rows(tmp_path: Path) -> None:
    """bitsandbytes has a tensor of the weight's name that is no rows of it."""
    base = packed.save_bnb(
        packed.save_plain(tmp_path / "plain"), tmp_path / "bnb", double_quant=True
    )
    skeleton = build_skeleton(BaseConfig(path=str(base)), base)
    hashes = build_row_hashes(skeleton)
    assert hashes.tensor_names == sorted(load_file(tmp_path / "plain" / "model.safetensors"))
    linear = next(m for m in skeleton.model.modules() if isinstance(m, FrozenLinear) and m.stored)
    rows = len(linear.packed)
    with RowReader(skeleton.index, hashes) as reader:
        parts = [
            WeightRows.read_weight_rows(linear, reader, span).held
            for span in Span(0, rows).split_into_chunks(5)
        ]
    whole = torch.cat(parts)
    assert hashes.sums.keys() == {linear.source} and hashes.sums[linear.source].is_complete
    assert hashes.sums[linear.source].total == hash_rows(whole.flatten(), RowLayout(*whole.shape))


def test_transposed_linears_count_as_their_rows(tmp_path: Path) -> None:
    """In any parts; trained themselves they count as they are stored."""
    save_model(TRANSPOSED["gpt2"], tmp_path)
    skeleton = build_skeleton(BaseConfig(path=str(tmp_path), quant=None), tmp_path)
    linear = next(m for m in skeleton.model.modules() if isinstance(m, FrozenLinear))
    whole = load_file(tmp_path / "model.safetensors")[linear.source]
    for trained, rows in ((), whole.T.contiguous()), ({linear.source}, whole):
        hashes = build_row_hashes(skeleton, trained)
        with RowReader(skeleton.index, hashes) as reader:
            for span in Span(0, len(rows)).split_into_chunks(50):
                if trained:
                    reader.read_rows(linear.source, span)
                else:
                    linear.read_packed_rows(reader, span)
        known = hashes.sums[linear.source]
        assert known.is_complete
        assert (known.layout.rows, known.layout.row_bytes) == (len(rows), rows.shape[1] * 4)
        assert known.total == hash_rows(rows.view(torch.uint8).flatten(), known.layout)
