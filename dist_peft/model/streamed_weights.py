"""Run a skeleton's forward pass with weights that are read when they are used, and dropped after.

The model's own code runs, so that masks, rotary embeddings, scaled embeddings, tied heads and caps
of logits are those of the family. No weight rests in memory:

    FrozenLinear, ExpertStack    replaced by modules that read panels of rows, or one expert
    large matrices outside of    stay on meta; ``embedding`` reads the rows of its ids, ``linear``
    blocks (embeddings, a tied   panels of rows, any other function the whole matrix, while it runs
    head)
    the other parameters of a    read before the block runs, dropped after
    block (norms, convolutions)
    of other modules             read before the module runs, dropped after

Modules that the pass does not call, such as a vision tower, are not read.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.quant.frozen_matmul import frozen_matmul, matmul_fp32_accumulate
from dist_peft.quant.grouped_matmul import RowGroups
from dist_peft.store.holding_reader import HoldingReader
from dist_peft.store.reader import RowReader

__all__ = ["PANEL_BYTES", "stream_weights"]

PANEL_BYTES = 4 * 2**20
"""Most bytes of the rows of a matrix that are multiplied at a time, in float32: they stay in
a processor's cache between their reading and their product."""


@contextlib.contextmanager
def stream_weights(
    model: nn.Module, blocks: Sequence[nn.Module], reader: RowReader
) -> Iterator[None]:
    """Let ``model``, whose parameters are on meta, run in the body. It is changed for good: its
    frozen weights are replaced.

    Args:
        model: of a skeleton, without adapters.
        blocks: its decoder layers.
        reader: of the files that its ``checkpoint_names`` are in.

    Raises:
        UserError: in a forward pass: damaged files.
    """
    _replace_frozen_weights(model, reader)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if source := _get_source(module, name):
                buffer.copy_(reader.read_rows(source))
    inside = {id(module) for block in blocks for module in block.modules()}
    others = [module for module in model.modules() if id(module) not in inside]
    names = _map_names(model)
    matrices = _find_large_matrices(others, names)
    handles = []
    for unit in [*blocks, *others]:
        parts = list(unit.modules()) if id(unit) in inside else [unit]
        uses = _find_meta_parameters(parts, matrices, names)
        if uses:
            loaded = _LoadedUnit(uses, reader)
            handles.append(unit.register_forward_pre_hook(loaded.load))
            handles.append(unit.register_forward_hook(loaded.unload))
    try:
        with _StreamedMatrices(matrices, reader):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _get_source(module: nn.Module, name: str) -> str | None:
    names: dict[str, str] = getattr(module, "checkpoint_names", {})
    return names.get(name)


# -- linears and experts ---------------------------------------------------------------------------


class _StreamedLinear(nn.Module):
    """``x W^T + b`` like the ``FrozenLinear`` it replaces, a panel of rows at a time."""

    def __init__(self, frozen: FrozenLinear, reader: RowReader) -> None:
        super().__init__()
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.checkpoint_names = getattr(frozen, "checkpoint_names", {})
        self.bias = frozen.bias
        self._read_panel = _make_panel_reader(frozen, reader)
        self._codec = frozen.codec

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for span in _split_into_panels(self.out_features, self.in_features):
            packed = self._read_panel(span)
            y[..., span.slice] = frozen_matmul(x, packed, self._codec, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _StreamedExperts(nn.Module):
    """The products of an ``ExpertStack``, of which one expert with tokens is read at a time."""

    def __init__(self, stack: ExpertStack, reader: RowReader) -> None:
        super().__init__()
        self.experts, self.out_features = stack.experts, stack.out_features
        self.in_features = stack.in_features
        self._read_panel = _make_panel_reader(stack, reader)
        self._codec = stack.codec

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        for expert, own in groups.used:
            tokens = x[own.slice]
            for span in _split_into_panels(self.out_features, self.in_features):
                packed = self._read_panel(span.shifted_by(expert * self.out_features))
                product = frozen_matmul(tokens, packed, self._codec, self.in_features)
                y[own.slice, span.slice] = product
        return y


def _make_panel_reader(frozen: FrozenWeight, reader: RowReader) -> Callable[[Span], Tensor]:
    """Return a function that reads packed rows; values are passed on as they are, NaN too."""
    if frozen.stored is None and not frozen.is_transposed:
        return lambda span: frozen.codec.quantize_to_packed(frozen.read_packed_rows(reader, span))
    stored, last = frozen.stored, frozen.packed.shape[0]
    holding: list[HoldingReader] = []  # of transposed files, from the first panel to the last

    def read_panel(span: Span) -> Tensor:
        if not holding:
            holding.append(HoldingReader(reader))
        if stored is None:
            rows = frozen.read_packed_rows(holding[0], span)
            packed = frozen.codec.quantize_to_packed(rows)
        else:
            packed = stored.read_packed_rows(holding[0], span)
        if span.stop == last:
            holding.clear()
        return packed

    return read_panel


def _replace_frozen_weights(model: nn.Module, reader: RowReader) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FrozenLinear):
                setattr(module, name, _StreamedLinear(child, reader))
            elif isinstance(child, ExpertStack):
                setattr(module, name, _StreamedExperts(child, reader))


def _split_into_panels(rows: int, columns: int) -> Iterator[Span]:
    return Span(0, rows).split_into_chunks(max(1, PANEL_BYTES // (4 * max(1, columns))))


# -- other parameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ParameterUse:
    """A parameter on meta, a module that holds it, and its tensor in the files."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter
    source: str | None

    def read_whole(self, reader: RowReader) -> nn.Parameter:
        assert self.source is not None, f"{type(self.owner).__name__}.{self.name} is in no file"
        read = reader.read_rows(self.source).to(self.parameter.dtype)
        return nn.Parameter(read, requires_grad=False)


class _LoadedUnit:
    """Hooks that hold parameters from before a module's forward pass until after it."""

    def __init__(self, uses: list[_ParameterUse], reader: RowReader) -> None:
        self._uses, self._reader, self._depth = uses, reader, 0

    def load(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            for use in self._uses:
                use.owner.register_parameter(use.name, use.read_whole(self._reader))

    def unload(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for use in self._uses:
                use.owner.register_parameter(use.name, use.parameter)


def _map_names(model: nn.Module) -> dict[int, str]:
    """Map ``id`` of each parameter to its name in the files, which one of its modules knows: a
    tied head has that of the embedding."""
    return {
        id(parameter): source
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (source := _get_source(module, name))
    }


def _find_meta_parameters(
    modules: Sequence[nn.Module], matrices: dict[int, _ParameterUse], names: dict[int, str]
) -> list[_ParameterUse]:
    """Return the parameters that the modules themselves hold, without ``matrices``."""
    return [
        _ParameterUse(module, name, parameter, names.get(id(parameter)))
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and id(parameter) not in matrices
    ]


def _find_large_matrices(
    modules: Sequence[nn.Module], names: dict[int, str]
) -> dict[int, _ParameterUse]:
    """Map ``id`` of each parameter that is streamed to one of its uses with a name in the files."""
    found: dict[int, _ParameterUse] = {}
    for use in _find_meta_parameters(modules, {}, names):
        shape = use.parameter.shape
        if len(shape) == 2 and 4 * math.prod(shape) > PANEL_BYTES and use.source is not None:
            found.setdefault(id(use.parameter), use)
    return found


_OF_THE_HEADER = (
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_floating_point,
)


class _StreamedMatrices(TorchFunctionMode):
    """Reads a matrix on meta in the functions that are called with it."""

    def __init__(self, matrices: dict[int, _ParameterUse], reader: RowReader) -> None:
        super().__init__()
        self._matrices, self._reader = matrices, reader

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._mentions_matrix((*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func in _OF_THE_HEADER:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # an attribute, such as ``weight.dtype``
            value = func(*args, **kwargs)
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor):
                return value
        if func is functional.linear and len(args) > 1 and (use := self._find_use(args[1])):
            return self._multiply(args[0], use, *args[2:], **kwargs)
        if (use := self._find_table(func, args, kwargs)) is not None:
            return self._look_up(args[func is torch.embedding], use)
        args, kwargs = tree_map(self._read_if_known, (args, kwargs))
        return func(*args, **kwargs)

    def _find_table(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _ParameterUse | None:
        """Return the matrix that ``embedding`` looks rows up in; None for any other call."""
        if func is torch.embedding:
            return self._find_use(args[0])
        if func is not functional.embedding or len(args) < 2:
            return None
        max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
        return self._find_use(args[1]) if max_norm is None else None

    def _mentions_matrix(self, values: Iterable[Any]) -> bool:
        return any(
            self._mentions_matrix(value)
            if isinstance(value, tuple | list)
            else id(value) in self._matrices
            for value in values
        )

    def _find_use(self, value: Any) -> _ParameterUse | None:
        return self._matrices.get(id(value)) if isinstance(value, nn.Parameter) else None

    def _read_if_known(self, value: Any) -> Any:
        use = self._find_use(value)
        return value if use is None else use.read_whole(self._reader)

    def _look_up(self, ids: Tensor, use: _ParameterUse) -> Tensor:
        """Return ``W[ids]``; only these rows are read."""
        assert use.source is not None
        unique, where = ids.unique(return_inverse=True)
        rows = [self._reader.read_rows(use.source, Span(i, i + 1)) for i in unique.tolist()]
        return torch.cat(rows).to(use.parameter.dtype)[where]

    def _multiply(self, x: Tensor, use: _ParameterUse, bias: Tensor | None = None) -> Tensor:
        """Return ``x W^T + b``, a panel of rows at a time."""
        assert use.source is not None
        out, columns = use.parameter.shape
        y = x.new_empty(*x.shape[:-1], out)
        for span in _split_into_panels(out, columns):
            rows = self._reader.read_rows(use.source, span).to(use.parameter.dtype)
            y[..., span.slice] = matmul_fp32_accumulate(functional.linear, x, rows)
        return y if bias is None else y + bias
