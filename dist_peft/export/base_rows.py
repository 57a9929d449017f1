"""Iterate over the rows of a base as training saw them, without any adapter."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.span import Span
from dist_peft.export.base_weights import list_base_weights
from dist_peft.export.merged_weights import CHUNK_BYTES
from dist_peft.model.frozen_linear import WeightRows
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.holding_reader import HoldingReader
from dist_peft.store.reader import RowReader

__all__ = ["iterate_base_rows"]


def iterate_base_rows(
    base: BaseConfig, directory: Path, labels: Sequence[str], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[str, Tensor, Span]]:
    """Yield path, rows and row span of every tensor of the base as training saw it, without any
    adapter. Rows of experts that are stored together are matrices, as they are stored."""
    skeleton = build_skeleton(base, directory, labels)
    with RowReader(skeleton.index) as reader:
        for weight in list_base_weights(skeleton):
            size = torch.Size(weight.info.shape[1:]).numel()
            holding = HoldingReader(reader)
            if skeleton.head is not None and weight.path in skeleton.head.new:
                continue
            for span in Span(0, weight.num_rows).split_into_chunks(
                max(1, chunk_bytes // 4 // max(1, size))
            ):
                if weight.linear is None:
                    yield weight.path, reader.read_rows(weight.name, span), span
                    continue
                own = weight.span_in_linear(span)
                packed = WeightRows.read_weight_rows(weight.linear, holding, own).to_packed(
                    lambda rows: rows
                )
                columns = weight.linear.in_features
                rows = weight.linear.codec.dequantize_rows(packed, columns, torch.float32)
                if weight.is_transposed:
                    rows = weight.to_stored_shape(rows).flatten(0, 1)
                    own = Span(span.start * columns, span.stop * columns)
                yield weight.path, rows, own
