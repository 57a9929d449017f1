"""Rows of a base as training saw it: all of them, once, dequantized where they are packed."""

from pathlib import Path

import torch

from dist_peft.core.config.run import QuantConfig
from dist_peft.export.base_rows import iterate_base_rows
from tests.support.export_runs import decode_base, make_run


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
