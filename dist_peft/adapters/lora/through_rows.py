"""A rank's rows of a weight that is trained through its quantizer, and their encoding.

Linears and stacks of experts keep and encode rows in the same way; only the product that is added
to them differs (``through_quantizer``, ``through_experts``).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dist_peft.adapters.low_rank.blocked_product import BLOCK_ROWS
from dist_peft.adapters.low_rank.module import LowRankModule
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.config.through_options import ThroughStart
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import JoinedForm, Reduce
from dist_peft.model.frozen_linear import FrozenWeight
from dist_peft.quant.codec import make_finer_codec
from dist_peft.quant.kept_grid import count_changed_codes, quantize_on_grid
from dist_peft.quant.packed_rows import count_chunk_rows

__all__ = ["ThroughRows", "encode_by_blocks", "keep_rows_exactly"]

AddProduct = Callable[[Tensor, Span], Tensor]
"""Rows ``span`` of the weight, on their device -> float32 rows of ``W + s B A``."""


class ThroughRows(LowRankModule):
    """A wrapper whose base has the packed rows of ``W + s B A``.

    The adapter cannot be switched off: the base's own bytes are no longer there.

    Attributes:
        start: form of the first steps (``adapter.through_start``), while it is trained in it.
        own_span: this rank's rows of the weight.
        own_rows: these rows of the base's files, ``[len(own_span), in]`` in host memory, in the
            narrowest type that holds them exactly; of a base that is packed in its files, the
            packed rows.
        num_changed: of such a base, weights of own rows whose code was another one than the base's
            when they were last counted.
    """

    keeps_base = False
    base: FrozenWeight
    start: ThroughStart = "none"
    own_span: Span
    own_rows: Tensor
    num_changed = 0

    @property
    def joined_form(self) -> JoinedForm:
        return None  # it trains the base's bytes

    def set_start(self, start: ThroughStart) -> None:
        """Take another form than the base's, on meta, before the model is sharded."""
        self.start = start
        if start == "8bit":
            base = self.base
            assert base.packed.is_meta
            base.codec = make_finer_codec(base.codec)
            size = base.codec.num_row_bytes(base.in_features)
            empty = torch.empty(len(base.packed), size, dtype=torch.uint8, device="meta")
            base.packed = nn.Parameter(empty, requires_grad=False)

    @property
    def needs_base_rows(self) -> bool:
        """True: rows are kept."""
        return True

    @torch.no_grad()
    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Keep the rows and return them: with ``B`` zero they are what is quantized."""
        if self.base.stored is None:
            self.own_span, self.own_rows = span, keep_rows_exactly(rows)
        return rows

    @torch.no_grad()
    def keep_packed_rows(self, packed: Tensor, span: Span) -> None:
        """Keep rows of a base that is packed in its files: they are ``W`` and its grid."""
        host = packed.detach().to("cpu", copy=True)
        self.own_span, self.own_rows = span, host.pin_memory() if packed.is_cuda else host

    @abstractmethod
    def encode_from_factors(self, name: str, access: ParameterAccess, *, count: bool) -> Tensor:
        """Gather the factors and encode this rank's rows, ``uint8 [rows, row_bytes]``. Collective.

        Args:
            name: of the module, under which the factors are known.
            count: of a packed base, count the codes that changed.
        """

    def encode_added_rows(
        self,
        add: AddProduct,
        device: torch.device,
        *,
        finish: Callable[[Tensor, Span], Tensor] | None = None,
        count: bool = False,
    ) -> Tensor:
        """Return this rank's rows of ``quantize(W + s B A)``, ``uint8 [rows, row_bytes]``.

        Args:
            add: adds the product.
            device: where rows are encoded.
            finish: changes packed rows of a base that is not packed in its files.
            count: of a packed base, count the codes that changed.

        Raises:
            UserError: the codec cannot hold the values.
        """
        self.num_changed = 0
        base, grid = self.base, self.base.codec.grid_rows

        def encode_chunk(span: Span) -> Tensor:
            own = self.own_rows[span.shifted_by(-self.own_span.start).slice]
            kept = own.to(device, non_blocking=True)
            if base.stored is None:
                packed = base.codec.quantize_to_packed(add(kept, span))
                return packed if finish is None else finish(packed, span)
            assert grid is not None
            rows = base.codec.dequantize_rows(kept, base.in_features, torch.float32)
            packed = quantize_on_grid(add(rows, span), kept, grid, base.in_features)
            if count:
                self.num_changed += count_changed_codes(packed, kept, grid, base.in_features)
            return packed

        try:
            return encode_by_blocks(base, self.own_span, encode_chunk, device)
        except ValueError as error:
            raise UserError(
                f"{self.path}: rows of W + s B A cannot be quantized: {error}; lower train.lr"
            ) from None


def encode_by_blocks(
    base: FrozenWeight, span: Span, encode: Callable[[Span], Tensor], device: torch.device
) -> Tensor:
    """Encode rows ``span`` a chunk at a time, so that one chunk is in memory in float32.

    Args:
        encode: a span -> its packed rows.

    Raises:
        ValueError: values that the codec cannot represent.
    """
    size = base.codec.num_row_bytes(base.in_features)
    packed = torch.empty(len(span), size, dtype=torch.uint8, device=device)
    chunk = max(1, count_chunk_rows(base.in_features, device) // BLOCK_ROWS) * BLOCK_ROWS
    for part in _split_at_blocks(span, chunk):
        own = part.shifted_by(-span.start).slice
        packed[own] = encode(part)
    return packed


def _split_at_blocks(span: Span, chunk: int) -> Iterator[Span]:
    """Split at multiples of ``chunk`` counted from row 0, so that no block is computed twice."""
    start = span.start
    while start < span.stop:
        stop = min(span.stop, (start // chunk + 1) * chunk)
        yield Span(start, stop)
        start = stop


def keep_rows_exactly(rows: Tensor) -> Tensor:
    """Copy float32 rows to host memory, pinned for a GPU, in 16 bits where these hold them exactly.

    The rows of a base in bfloat16 or float16 are kept in their own type, without knowing it.
    """
    host = rows.detach().to("cpu", copy=True)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = host.to(dtype)
        if torch.equal(narrow.float(), host):
            host = narrow
            break
    return host.pin_memory() if rows.is_cuda else host
