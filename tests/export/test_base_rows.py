"""Rows of a base as training saw it: all of them, once, dequantized where they are packed."""

from pathlib import Path

import pytest
import torch

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.export.base_rows import iterate_base_rows
from tests.support.export_runs import decode_base, make_run
from tests.support.loaded_models import load
from tests.support.tiny_models import TRANSPOSED, VARIANTS, save_model


def test_chunks_are_the_decoded_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", group_size=32))
    found: dict[str, list[torch.Tensor]] = {}
    for path, rows, span in iterate_base_rows(run.base, run.directory, (), chunk_bytes=4 * 64 * 7):
        assert span.start == sum(map(len, found.setdefault(path, [])))
        found[path].append(rows)
    decoded = decode_base(run)
    assert decoded.keys() < found.keys()
    for name, weight in decoded.items():
        assert torch.equal(torch.cat(found[name]), weight)


@pytest.mark.parametrize("family", ["gpt2", "dbrx"])
def test_transposed_weights_are_rows_of_their_files(family: str, tmp_path: Path) -> None:
    original = save_model((TRANSPOSED | VARIANTS)[family], tmp_path)
    base = BaseConfig(path=str(tmp_path), quant=None, compute_dtype="float32")
    weights = dict(original.named_parameters())
    found: dict[str, list[torch.Tensor]] = {}
    for path, rows, span in iterate_base_rows(base, tmp_path, (), chunk_bytes=4 * 64 * 150):
        own = path if path in weights else path.removesuffix(".weight")
        assert span.start == sum(map(len, found.setdefault(own, [])))
        found[own].append(rows)
    for name, weight in weights.items():
        if name in found:
            assert torch.equal(torch.cat(found[name]), weight), name
    assert any(name.endswith((".w2", "c_attn.weight")) for name in found)
    assert len(load(tmp_path).tensors) == len(found)
