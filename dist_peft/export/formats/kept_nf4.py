"""``bnb-nf4 --keep-adapter``: the codes of an NF4 base for bitsandbytes, with a separate adapter.

A merge into an NF4 base must be rounded again, which loses a part of the adapter. Here nothing is
rounded: the payload of each packed row (``quant.nf4``) equals bitsandbytes' payload, and its scales
are written un-nested, as the float32 numbers used for dequantization. (Double quantization of
bitsandbytes uses one offset for the whole weight and blocks that cross rows; that of this project
stays within a row, so that its 8-bit codes have no counterpart there.) ::

    weight               uint8 [out * in / 2, 1]    codes of the base as training held them
    weight.absmax        float32 [out * in / B]     scale of each block of B weights
    weight.quant_map     float32 [16]
    weight.quant_state.bitsandbytes__nf4            JSON as uint8: shape, types, block size

``B`` is 64, or 32 if the group size of the base is not a multiple of 64; a longer group repeats its
scale. Blocks of bitsandbytes cover the flattened weight, those of this project a row: both agree if
``B`` divides ``in_features``; other linears are refused.

With PiSSA and LoftQ the codes are those of the residual, ``W - s B0 A0``, which is the base that
the trained factors belong to.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.bnb_packer import (
    encode_quant_state,
    make_bnb_settings,
    make_quant_state_name,
)
from dist_peft.export.merged_weights import MergedWeights
from dist_peft.export.model_directory import TensorPiece
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.nf4 import NF4_LEVELS
from dist_peft.store.writer import TensorSpec

__all__ = ["KeptNf4Packer"]

_BLOCKS = (64, 32)
"""Block sizes that bitsandbytes reads, the most widely supported first."""


class KeptNf4Packer:
    """Pack the codes of an NF4 base; for weights in the state ``base``.

    Args:
        group_size: group size of the base.
        dtype: type that bitsandbytes dequantizes to and computes in.

    Raises:
        UserError: bitsandbytes has no block size that divides ``group_size``.
    """

    row_multiple = 1

    def __init__(self, group_size: int, dtype: torch.dtype) -> None:
        found = next((size for size in _BLOCKS if group_size % size == 0), None)
        if found is None:
            raise UserError(
                f"the base is quantized in groups of {group_size} weights, and bitsandbytes reads "
                "blocks of 32 or 64: its codes cannot be kept. Use hf-bf16 with --base decoded, or "
                "train with base.quant.group_size: 64"
            )
        self.block, self.group_size, self.dtype = found, group_size, dtype

    def can_pack(self, weight: BaseWeight) -> bool:
        """Return whether blocks of bitsandbytes divide the rows of this NF4 weight."""
        has_codes = weight.codec is not None and weight.codec.nf4_rows is not None
        return has_codes and weight.num_columns % self.block == 0

    def check_packable(self, walk: MergedWeights) -> None:
        """Check, before anything is written, that the codes of every linear can be kept.

        Raises:
            UserError: a linear's codes cannot; stored dense it would compute another function.
        """
        for weight in walk.weights:
            if walk.is_packable(weight) and not self.can_pack(weight):
                raise self._make_block_size_error(weight.name, weight.num_columns)

    def check_model_linears(self, model: nn.Module) -> None:
        """Check, before training, that the codes of every linear of a model on meta can be kept.

        Raises:
            UserError: blocks of bitsandbytes do not divide the ``in_features`` of a linear.
        """
        for linear in model.modules():
            if not isinstance(linear, FrozenLinear) or linear.is_head:
                continue
            if linear.codec.nf4_rows is None:
                continue
            if linear.in_features % self.block:
                raise self._make_block_size_error(linear.source, linear.in_features)

    def _make_block_size_error(self, name: str, columns: int) -> UserError:
        return UserError(
            f"{name} has in_features {columns}, which blocks of {self.block} do not divide: "
            "bitsandbytes' blocks would run from one row into the next, and the codes of the base "
            "cannot be kept. Use hf-bf16 with --base decoded"
        )

    def plan_tensors(self, weight: BaseWeight) -> list[TensorSpec]:
        elements, name = weight.num_rows * weight.num_columns, weight.written
        state = encode_quant_state(weight, self.block, self.dtype)
        return [
            TensorSpec(name, torch.uint8, (elements // 2, 1)),
            TensorSpec(f"{name}.absmax", torch.float32, (elements // self.block,)),
            TensorSpec(f"{name}.quant_map", torch.float32, (len(NF4_LEVELS),)),
            TensorSpec(make_quant_state_name(weight), torch.uint8, tuple(state.shape)),
        ]

    def pack_rows(
        self, walk: MergedWeights, weight: BaseWeight, span: Span
    ) -> Iterable[TensorPiece]:
        assert weight.codec is not None and weight.codec.nf4_rows is not None
        payload, scales = weight.codec.nf4_rows.split_packed_rows(
            walk.read_packed_rows(weight, span), weight.num_columns
        )
        # the payload of a row's last group may include padding
        codes = payload[:, : weight.num_columns // 2].reshape(-1, 1)
        group = torch.arange(weight.num_columns // self.block) * self.block // self.group_size
        absmax = scales[:, group].flatten()
        yield TensorPiece(weight.written, codes, span.start * weight.num_columns // 2)
        yield TensorPiece(
            f"{weight.written}.absmax", absmax, span.start * weight.num_columns // self.block
        )
        if span.stop == weight.num_rows:
            yield TensorPiece(f"{weight.written}.quant_map", torch.tensor(NF4_LEVELS), 0)
            state = encode_quant_state(weight, self.block, self.dtype)
            yield TensorPiece(make_quant_state_name(weight), state, 0)

    def make_config(self, walk: MergedWeights, unpacked: list[str]) -> Mapping[str, Any]:
        return make_bnb_settings(walk, unpacked, double_quant=False, dtype=self.dtype)
