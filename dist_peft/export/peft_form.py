"""Measure the error of a PiSSA or LoftQ adapter in PEFT's format against the trained model.

Such a run trains factors on top of the quantized *residual* of the base; its adapter is saved as
the change since initialization, relative to the *original* base::

    trained    decode(encode(W - s B0 A0)) + s B A
    with PEFT  W                           + s (B A - B0 A0)

The two differ by the quantization error of the residual, which an adapter of that form cannot
hold. The difference is reported relative to the change by training, ``s (B A - B0 A0)``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.full.format import contains_trained_weights
from dist_peft.adapters.lora.merge import LoraMerger
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.span import Span
from dist_peft.export.verify import EXACT_BOUND
from dist_peft.model.frozen_linear import FrozenLinear, WeightRows
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader

__all__ = ["PeftFormError", "measure_peft_form"]

_PIECES, _PIECE_ROWS = 4, 16
"""Sampled rows of a linear: this many evenly spaced runs of this many consecutive rows."""


@dataclass(frozen=True)
class PeftFormError:
    """Error of the weights that PEFT computes with, over the sampled rows.

    Attributes:
        share: Frobenius norm of the difference, divided by that of the change by training.
        linears: number of linears that were compared.
        rows: number of rows that were compared.
    """

    share: float
    linears: int
    rows: int

    @property
    def is_exact(self) -> bool:
        """Whether the error is within the bound for forms that keep the trained function."""
        return self.share <= EXACT_BOUND


@torch.no_grad()
def measure_peft_form(base: BaseConfig, directory: Path, adapter_dir: Path) -> PeftFormError | None:
    """Compare trained weights and those with PEFT on sampled rows of each adapted linear.

    Rows are read from the base's files and freed; no collectives are used, so that a single rank
    can run it.

    Args:
        base: the run's base configuration.
        directory: directory of the base's files.
        adapter_dir: directory of the trained adapter.

    Returns:
        The error, or None if no linear was initialized by PiSSA or LoftQ: PEFT then computes the
        trained function on the base as trained.

    Raises:
        UserError: damaged files.
    """
    if contains_trained_weights(adapter_dir):
        return None
    public = read_adapter_directory(adapter_dir)
    start = public.facts.get("start")
    if start is None:
        return None
    labels = read_adapter_metadata(adapter_dir).get("labels", ())
    skeleton = build_skeleton(base, directory, labels)
    merger = LoraMerger.from_public_adapter(public)
    error = change = 0.0
    linears = rows = 0
    with RowReader(skeleton.index) as reader:
        for path, linear in skeleton.model.named_modules():
            weight = f"{path}.weight"
            if not isinstance(linear, FrozenLinear) or not merger.has_initial_factors(weight):
                continue
            linears += 1
            for span in _sample_row_spans(linear.out_features):
                read = WeightRows.read_weight_rows(linear, reader, span)
                packed = read.to_packed(partial(merger.compute_encoded_rows, weight, span=span))
                decoded = linear.codec.dequantize_rows(packed, linear.in_features, torch.float32)
                trained = merger.merge_weight_rows(weight, decoded, span, "decoded")
                with_peft = merger.merge_weight_rows(weight, read.to_float(), span, "original")
                begun = merger.compute_initial_rows(weight, decoded, span)
                error += float((with_peft - trained).double().square().sum())
                change += float((trained - begun).double().square().sum())
                rows += len(span)
    if not linears:
        return None
    return PeftFormError(math.sqrt(error / change) if change else math.inf, linears, rows)


def _sample_row_spans(rows: int) -> Iterator[Span]:
    """Yield spans of rows to compare; a small linear is compared as a whole."""
    if rows <= _PIECES * _PIECE_ROWS:
        yield Span(0, rows)
        return
    for piece in range(_PIECES):
        start = piece * (rows - _PIECE_ROWS) // (_PIECES - 1)
        yield Span(start, start + _PIECE_ROWS)
