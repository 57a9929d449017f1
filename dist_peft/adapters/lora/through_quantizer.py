"""LoRA through the quantizer: the trained model is the merged model in the base's own format.

::

    Q = quantize(W + s B A)     forward: y = x Q^T + b      (``quant.through_product``)

``W`` are the rows of the base's files, not the decoded base: a decoded weight lies in the middle
of its cell and must move half a step before any code changes. After each update every rank

1. gathers ``A`` [r, in] and ``B`` [out, r], which are small,
2. adds ``s B A`` to its own rows of ``W``, which it keeps in host memory (1/N of them), in blocks
   of 64 rows counted from row 0 of the whole matrix (``low_rank.blocked_product``),
3. quantizes these rows with the base's codec and writes the bytes over those in its shard.

Codecs are row-local and the blocks do not depend on the shards, so that the bytes are the same on
any number of ranks and on every engine. What travels in a step is packed rows, as many as before.
``Q`` is a function of ``W``, ``A`` and ``B``: checkpoints hold the factors, and a resume encodes
the rows again.

The gradient goes straight through the rounding (Bengio et al. 2013). What differs from quantization
aware training with LoRA (axolotl's for NVFP4, LoTA-QAF): no rank has a dense merged weight, a dense
gradient or another rank's rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.low_rank.blocked_product import BLOCK_ROWS, add_blocked_product
from dist_peft.adapters.step_hooks import ParameterAccess
from dist_peft.core.config.through_options import ThroughStart
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import Reduce, RowUpdate
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import make_finer_codec
from dist_peft.quant.packed_rows import count_chunk_rows
from dist_peft.quant.through_product import multiply_through

__all__ = [
    "NF4_BLOCK",
    "ThroughLinear",
    "encode_merged_rows",
    "keep_rows_exactly",
    "require_codec",
    "resolve_start",
    "update_rows",
]

NF4_BLOCK = 64
"""Block of bitsandbytes: its blocks run over the flattened weight, and so agree with rows whose
length it divides."""


class ThroughLinear(LoraLinear):
    """A ``FrozenLinear`` whose packed rows are those of ``W + s B A``.

    The adapter cannot be switched off: the base's own bytes are no longer there.

    Attributes:
        start: form of the first steps (``adapter.through_start``), while it is trained in it.
        own_span: this rank's rows of the weight.
        own_rows: these rows of the base's files, ``[len(own_span), in]`` in host memory, in the
            narrowest type that holds them exactly; of a base that is packed in its files, the
            packed rows.
    """

    keeps_base = False
    start: ThroughStart = "none"
    own_span: Span
    own_rows: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out] in the type of ``x``."""
        if self.start == "lora":
            return super().forward(x)
        base, spec = self.base, self.spec
        y = multiply_through(
            x,
            base.packed,
            self.lora_A,
            self.lora_B,
            codec=base.codec,
            scaling=spec.scaling,
            dtype=spec.arithmetic,
        )
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def set_start(self, start: ThroughStart) -> None:
        """Take another form than the base's, on meta, before the model is sharded."""
        self.start = start
        if start == "8bit":
            base = self.base
            assert base.packed.is_meta
            base.codec = make_finer_codec(base.codec)
            size = base.codec.num_row_bytes(base.in_features)
            empty = torch.empty(base.out_features, size, dtype=torch.uint8, device="meta")
            base.packed = nn.Parameter(empty, requires_grad=False)

    @property
    def needs_base_rows(self) -> bool:
        """True: rows are kept."""
        return True

    @torch.no_grad()
    def prepare_base_rows(self, rows: Tensor, span: Span, reduce: Reduce) -> Tensor:
        """Keep the rows and return them: with ``B`` zero they are what is quantized."""
        self.own_span, self.own_rows = span, keep_rows_exactly(rows)
        return rows

    @torch.no_grad()
    def encode_own_rows(self, A: Tensor, B: Tensor, device: torch.device) -> Tensor:
        """Return this rank's rows of ``quantize(W + s B A)``, ``uint8 [rows, row_bytes]``.

        Args:
            A, B: whole, float32.
            device: where rows are encoded.

        Raises:
            UserError: the codec cannot hold the values.
        """
        right = A.to(device, torch.float32) * self.spec.scaling

        def merge_chunk(span: Span) -> Tensor:
            kept = self.own_rows[span.shifted_by(-self.own_span.start).slice]
            return add_blocked_product(kept.to(device, non_blocking=True), B, right, span)

        try:
            return encode_merged_rows(self.base, self.own_span, merge_chunk, device)
        except ValueError as error:
            raise UserError(
                f"{self.path}: rows of W + s B A cannot be quantized: {error}; lower train.lr"
            ) from None


def encode_merged_rows(
    base: FrozenLinear, span: Span, merge: Callable[[Span], Tensor], device: torch.device
) -> Tensor:
    """Quantize rows ``span`` a chunk at a time, so that one chunk is in memory in float32.

    Args:
        merge: rows of a span -> their values, float32 ``[rows, in]``.

    Raises:
        ValueError: values that the codec cannot represent.
    """
    size = base.codec.num_row_bytes(base.in_features)
    packed = torch.empty(len(span), size, dtype=torch.uint8, device=device)
    chunk = max(1, count_chunk_rows(base.in_features, device) // BLOCK_ROWS) * BLOCK_ROWS
    for part in _split_at_blocks(span, chunk):
        own = part.shifted_by(-span.start).slice
        packed[own] = base.codec.quantize_to_packed(merge(part))
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


def resolve_start(start: ThroughStart, layers: Sequence[ThroughLinear]) -> ThroughStart:
    """Return the form of the first steps.

    Raises:
        UserError: 8 bits of a base that is packed in its files.
    """
    packed = [layer.path for layer in layers if layer.base.stored is not None]
    if start == "auto":
        return "lora" if packed else "none"
    if start == "8bit" and packed:
        raise UserError(
            f"adapter.through_start: 8bit encodes the base's own 16-bit rows, but {packed[0]} "
            "comes quantized from base.path; use lora or none"
        )
    return start


def require_codec(name: str, module: FrozenLinear) -> None:
    """Refuse a linear that cannot be trained through its codec.

    Raises:
        UserError: it is not quantized, is packed already, or NF4 blocks of bitsandbytes would
            cross its rows.
    """
    if module.stored is not None:
        raise UserError(
            f"adapter.through_quantizer encodes the base's own 16-bit rows again after each step, "
            f"but {name} comes quantized from base.path, without them: give the unquantized base "
            "with base.quant, or set adapter.through_quantizer: false"
        )
    if not module.codec.is_quantized:
        raise UserError(
            f"adapter.through_quantizer trains the quantized weights, but {name} is not quantized; "
            "set base.quant, or take the module out of adapter.target_modules"
        )
    if module.codec.nf4_rows is not None and module.in_features % NF4_BLOCK:
        raise UserError(
            f"adapter.through_quantizer: {name} has in_features {module.in_features}, which "
            f"{NF4_BLOCK} does not divide: blocks of bitsandbytes would run from one row into the "
            "next, and no NF4 model could hold the trained codes; take the module out of "
            "adapter.target_modules, or use base.quant.kind: int"
        )


def update_rows(layers: Iterable[tuple[str, nn.Module]], access: ParameterAccess) -> None:
    """Encode this rank's rows of every ``ThroughLinear`` again. Collective."""

    def encode_all() -> Iterator[RowUpdate]:
        for path, layer in layers:
            if isinstance(layer, ThroughLinear) and layer.start != "lora":
                A, B = (access.gather_parameter(f"{path}.lora_{factor}") for factor in "AB")
                rows = layer.encode_own_rows(A, B, access.device)
                yield RowUpdate(layer.base, "packed", rows)

    access.overwrite_local_rows(encode_all())
