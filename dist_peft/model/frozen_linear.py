"""A linear layer whose weight is frozen, packed and decoded only while it multiplies.

The weight ``[out, in]`` rests as one ``uint8`` parameter ``[out, row_bytes]`` in the format of a
codec, each row self-contained, so that engines shard it along rows like any other parameter::

    y = x W^T + b        W = codec.decode(packed)

``decode`` happens inside ``frozen_matmul`` in forward and once more in backward; no decoded copy
outlives either. This is the base layer of QLoRA (Dettmers et al. 2023), with one difference to
bitsandbytes' ``Linear4bit``: scales and zeros lie in the row beside the codes, not in a separate
state that engines would replicate.
"""

import torch
from torch import Tensor, nn

from dist_peft.quant.codec import Codec
from dist_peft.quant.matmul import frozen_matmul

__all__ = ["FrozenLinear"]


class FrozenLinear(nn.Module):
    """``y = x W^T + b`` with a packed, frozen ``W``.

    Args:
        in_features, out_features: shape of the weight, ``[out, in]``.
        codec: how rows are packed.
        bias: whether there is a bias ``[out]``.
        bias_dtype: type of the bias.
        source: name of the weight in the checkpoint's files.
        device: where the (unfilled) parameters are made; ``meta`` in a run.

    Attributes:
        packed: ``uint8 [out, row_bytes]``, frozen.
        bias: ``[out]``, frozen, or ``None``.
        is_head: this is the output head, which ``all-linear`` leaves out.
    """

    is_head: bool = False
    packed: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codec: Codec,
        bias: bool,
        bias_dtype: torch.dtype,
        source: str,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.codec, self.source = codec, source
        shape = (out_features, codec.row_bytes(in_features))
        self.packed = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=bias_dtype, device=device), False
            )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of ``x``."""
        y = frozen_matmul(x, self.packed, self.codec, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [out, in]; allocates it."""
        return self.codec.decode(self.packed, self.in_features, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"codec={self.codec.name}, bias={self.bias is not None}"
        )
