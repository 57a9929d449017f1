"""A linear layer with a frozen, packed weight that is dequantized only for the product.

The weight ``[out, in]`` is stored as one ``uint8`` parameter ``[out, row_bytes]`` in the format of
a codec, each row self-contained, so that engines shard it along rows like any other parameter::

    y = x W^T + b        W = codec.decode(packed)

``decode`` happens inside ``frozen_matmul`` in forward and once more in backward; no dequantized
copy outlives either. This is the base layer of QLoRA (Dettmers et al. 2023), with one difference to
bitsandbytes' ``Linear4bit``: scales and zeros lie in the row with the codes, not in a separate
state that engines would replicate.

``FrozenWeight`` is the packed weight alone, which linears share with the experts of a mixture
(``model.experts``).

``WeightRows`` is the one way from a base's files to packed rows, for loading as for exports: rows
of an unquantized base are encoded, those of a prequantized base are packed already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.quant.codec import Codec
from dist_peft.quant.frozen_matmul import frozen_matmul
from dist_peft.quant.kept_grid import quantize_on_grid
from dist_peft.store.reader import RowReader

__all__ = [
    "WHOLE_ELEMENTS",
    "FrozenLinear",
    "FrozenWeight",
    "Pieces",
    "PrequantizedLinear",
    "StackPiece",
    "WeightRows",
    "all_rows_finite",
    "describe_stored_otherwise",
]

WHOLE_ELEMENTS = 2**26
"""Most values of a packed output head that is dequantized whole: 128 MiB in 16 bits."""


class PrequantizedLinear(Protocol):
    """A linear of a prequantized base."""

    @property
    def codec(self) -> Codec:
        """Codec of the rows."""

    @property
    def has_middle_zeros(self) -> bool:
        """Whether its codes are integers without zero points: all zeros are half of the range."""

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read rows packed by the linear's codec, ``uint8 [len(span), row_bytes]``."""


@dataclass(frozen=True)
class StackPiece:
    """Consecutive rows of a weight that are one tensor of the files.

    Attributes:
        name: the tensor, ``[rows, in]``; or of any shape that is these rows if flattened.
        span: which rows of the weight.
    """

    name: str
    span: Span


Pieces = tuple[StackPiece, ...]
"""All rows of a weight, in order."""


class FrozenWeight(nn.Module):
    """A packed, frozen weight of a linear or of experts.

    Args:
        in_features: columns of the weight.
        rows: of the weight.
        codec: how rows are packed.
        source: name of the weight in the checkpoint's files.
        device: of the unfilled parameter; ``meta`` in a run.
        stored: reader of packed rows of a prequantized base; None: rows are encoded.

    Attributes:
        packed: ``uint8 [rows, row_bytes]``, frozen.
        pieces: where the rows of experts are in the files, and of a linear that the files have as
            several tensors; set when the model is built. Empty: in ``source``.
        is_head: this is the output head, which ``all-linear`` leaves out.
        is_tied: ``packed`` is that of the input embedding; nothing adapts it.
        is_transposed: an unquantized tensor of the files is ``[in, out]``, of experts ``[E, in,
            out]`` or these one below the other: rows are columns there.
        without_gradient: the model's code lets no gradient through from its output, so an adapter
            on it cannot be trained; ``all-linear`` leaves it out.
    """

    is_head: bool = False
    is_tied: bool = False
    without_gradient: bool = False
    is_transposed: bool = False
    pieces: Pieces = ()
    packed: nn.Parameter

    def __init__(
        self,
        in_features: int,
        rows: int,
        codec: Codec,
        source: str,
        device: torch.device | str,
        stored: PrequantizedLinear | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.codec, self.source, self.stored = codec, source, stored
        shape = (rows, codec.num_row_bytes(in_features))
        self.packed = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), False)

    def read_packed_rows(self, reader: RowReader, span: Span) -> Tensor:
        """Read rows of an unquantized base's files, ``[len(span), in]`` in their type; of each
        tensor that has some of them, only these are read."""
        if self.is_transposed:
            return self._read_columns(reader, self.stored_name, span)
        if not self.pieces:
            return reader.read_rows(self.source, span)
        dtypes = [reader.index.find_tensor(piece.name).dtype for piece in self.pieces]
        rows = torch.empty(len(span), self.in_features, dtype=reduce(torch.promote_types, dtypes))
        for piece in self.pieces:
            common = piece.span.intersect(span)
            if len(common):
                read = reader.read_flat_rows(piece.name, common.shifted_by(-piece.span.start))
                rows[common.shifted_by(-span.start).slice] = read
        return rows

    @property
    def stored_name(self) -> str:
        """The tensor in the files that has all rows, or the first ones."""
        return self.pieces[0].name if self.pieces else self.source

    @property
    def rows_each(self) -> int:
        """Rows of one matrix: of an expert where there are several, else of all."""
        return int(self.packed.shape[0])

    def _read_columns(self, reader: RowReader, name: str, span: Span) -> Tensor:
        """Read rows that are columns of each matrix in tensor ``name``."""
        parts, height = [], self.rows_each
        for number in range(span.start // height, -(-span.stop // height)):
            own = Span(number * height, (number + 1) * height).intersect(span)
            matrix = Span(number * self.in_features, (number + 1) * self.in_features)
            columns = own.shifted_by(-number * height)
            parts.append(reader.read_flat_rows(name, matrix, columns).T)
        if not parts:
            dtype = reader.index.find_tensor(name).dtype
            return torch.empty(0, self.in_features, dtype=dtype)
        rows = torch.cat(parts)
        if reader.hashes is not None:
            reader.hashes.add_packed_rows(name, span.start, rows.view(torch.uint8))
        return rows

    def dequantize_weight(self, dtype: torch.dtype) -> Tensor:
        """Dequantize the whole weight to a new tensor [rows, in]."""
        return self.codec.dequantize_rows(self.packed, self.in_features, dtype)

    def fake_quantize(self, rows: Tensor) -> Tensor:
        """Quantize and dequantize rows of the base's weight ``[n, in]``, as the product sees them.
        Rows of a prequantized base are returned unchanged."""
        if self.stored is not None:
            return rows
        return self.codec.dequantize_rows(
            self.codec.quantize_to_packed(rows), self.in_features, rows.dtype
        )


class FrozenLinear(FrozenWeight):
    """``y = x W^T + b`` with a packed, frozen ``W``.

    Args:
        in_features, out_features: shape of the weight, ``[out, in]``.
        codec, source, device, stored: as in ``FrozenWeight``.
        bias: whether there is a bias ``[out]``.
        bias_dtype: type of the bias.

    Attributes:
        bias: ``[out]``, frozen, or ``None``.
    """

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
        stored: PrequantizedLinear | None = None,
    ) -> None:
        super().__init__(in_features, out_features, codec, source, device, stored)
        self.out_features = out_features
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=bias_dtype, device=device), False
            )

    def forward(self, x: Tensor, multiply: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map ``x`` [..., in] to [..., out] in the type of ``x``.

        Args:
            multiply: in the place of the product, one with a change. It runs in this call, between
                the hooks with which an engine gathers and frees parameters.
        """
        if multiply is not None:
            y = multiply(x)
        else:
            y = frozen_matmul(x, self.packed, self.codec, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"codec={self.codec.name}, bias={self.bias is not None}"
        )


def describe_stored_otherwise(model: nn.Module) -> str | None:
    """Return how the files have a linear that is not a tensor of its rows; None: all are."""
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.is_transposed:
            return f"weights of the base are stored transposed ({path}, a Conv1D)"
        if isinstance(module, FrozenLinear) and module.pieces:
            return f"linears of the base are several tensors in its files ({path})"
    return None


@dataclass(frozen=True)
class WeightRows:
    """Rows of a packed weight as read from the files.

    Attributes:
        linear: the module that the rows belong to.
        held: ``[n, in]`` in the files' type, or packed rows of a prequantized base.
    """

    linear: FrozenWeight
    held: Tensor

    @classmethod
    def read_weight_rows(
        cls,
        linear: FrozenWeight,
        reader: RowReader,
        span: Span,
        device: torch.device | str = "cpu",
    ) -> "WeightRows":
        """Read rows ``span`` and bring them to ``device``.

        Raises:
            UserError: damaged files, or a weight that is not finite.
        """
        if linear.stored is not None:
            return cls(linear, linear.stored.read_packed_rows(reader, span).to(device))
        rows = linear.read_packed_rows(reader, span).to(device)
        if not all_rows_finite(rows):
            raise UserError(
                f"tensor {linear.source}: weight is not finite: NaN or infinity in a row; get the "
                "base again"
            )
        return cls(linear, rows)

    def to_float(self) -> Tensor:
        """Return the rows as float32 ``[n, in]``; those of a prequantized base are dequantized."""
        if self.linear.stored is None:
            return self.held.float()
        return self.linear.codec.dequantize_rows(self.held, self.linear.in_features, torch.float32)

    def to_packed(self, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return packed rows ``uint8 [n, row_bytes]``.

        Args:
            change: maps ``to_float()`` to the values to encode. Other values than its argument are
                put into the codes of a prequantized base, whose scales and zeros stay
                (``quant.kept_grid``).

        Raises:
            UserError: values that the codec cannot hold.
        """
        numbers = self.held if change is None else self.to_float()
        rows = numbers if change is None else change(numbers)
        linear = self.linear
        if linear.stored is not None and rows is numbers:
            return self.held
        try:
            if linear.stored is None:
                return linear.codec.quantize_to_packed(rows)
            grid = linear.codec.grid_rows
            assert grid is not None, f"{linear.source} is packed already and cannot change"
            return quantize_on_grid(rows, self.held, grid, linear.in_features)
        except ValueError as error:
            raise UserError(f"tensor {self.linear.source}: {error}") from None


def all_rows_finite(rows: Tensor) -> bool:
    """Return whether all values are finite, without a temporary: ``aminmax`` propagates NaN."""
    return not rows.numel() or all(bool(end.isfinite()) for end in rows.aminmax())
