"""Weights of a module that the files have as several tensors, one after another.

Hybrids with linear attention (Kimi Linear, OLMo-Hybrid, Bailing) are published with a convolution
each for query, key and value, and ``transformers`` computes one for all of their channels::

    q_conv1d.weight [Cq, 1, K] | k_conv1d.weight [Ck, 1, K] | v_conv1d.weight [Cv, 1, K]
    ->  conv1d.weight [Cq + Ck + Cv, 1, K]

Here the module keeps the three as parameters of their own, so that each is read, sharded, merged
and written as the tensor that it is in the files, and ``weight`` is computed from them where the
module or its parent reads it.

Of a linear (MiniMax-M3's shared experts, published with gate and up apart) the rows are packed
together, each tensor a piece of them (``FrozenWeight.pieces``).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, WeightConverter

from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import Pieces, StackPiece
from dist_peft.store.index import TensorInfo

__all__ = ["find_joined_linears", "split_joined_weights"]


def split_joined_weights(
    model: PreTrainedModel,
    in_files: Mapping[str, str],
    tensors: Mapping[str, TensorInfo | None],
    rules: Sequence[object],
) -> dict[str, str]:
    """Give modules whose weight ``transformers`` concatenates a parameter for each part.

    Args:
        model: on meta; linears are left alone (``find_joined_linears``).
        in_files: name in the model -> tensor in the files, after renamings.
        tensors: of the files; None: packed.
        rules: ``transformers``' conversions of the model's files.

    Returns:
        Full name of each new parameter -> tensor in the files.
    """
    found: dict[str, str] = {}
    for path, own, parts, sizes in _iterate_joined(model, in_files, tensors, rules):
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            continue
        _split_parameter(module, own, sizes)
        for number, source in enumerate(parts):
            found[f"{path}.{_name_part(own, number)}"] = source
    return found


def find_joined_linears(
    model: PreTrainedModel,
    in_files: Mapping[str, str],
    tensors: Mapping[str, TensorInfo | None],
    rules: Sequence[object],
) -> dict[str, Pieces]:
    """Return full name of each linear's weight that ``transformers`` concatenates -> the tensors
    that its rows are in, for arguments as in ``split_joined_weights``."""
    found: dict[str, Pieces] = {}
    for path, own, parts, sizes in _iterate_joined(model, in_files, tensors, rules):
        if isinstance(model.get_submodule(path), nn.Linear):
            ends = list(accumulate(sizes))
            spans = (Span(end - size, end) for end, size in zip(ends, sizes, strict=True))
            found[f"{path}.{own}"] = tuple(map(StackPiece, parts, spans))
    return found


def _iterate_joined(
    model: PreTrainedModel,
    in_files: Mapping[str, str],
    tensors: Mapping[str, TensorInfo | None],
    rules: Sequence[object],
) -> Iterator[tuple[str, str, list[str], list[int]]]:
    """Yield a module's path, the name of a weight in it, the tensors of its parts, and their
    rows."""
    for name, parts in _list_joined(in_files, rules).items():
        path, _, own = name.rpartition(".")
        path = path.removeprefix(model.base_model_prefix + ".")
        prefix = "" if _has_module(model, path) else model.base_model_prefix + "."
        if name in in_files or not _has_module(model, prefix + path):
            continue
        whole = model.get_submodule(prefix + path)._parameters.get(own)
        infos = [tensors[source] for source in parts]
        if whole is None or None in infos:
            continue
        sizes = [info.shape[0] for info in infos if info is not None]
        if sum(sizes) == whole.shape[0]:
            yield prefix + path, own, parts, sizes


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _list_joined(in_files: Mapping[str, str], rules: Sequence[object]) -> dict[str, list[str]]:
    """Return name of a weight -> the tensors of its parts, in order, where all are there."""
    converters = [
        rule
        for rule in rules
        if isinstance(rule, WeightConverter) and len(rule.target_patterns) == 1
        if [(type(o), getattr(o, "dim", None)) for o in rule.operations] == [(Concatenate, 0)]
    ]
    found: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for renamed, source in in_files.items():
        for converter in converters:
            name, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                patterns = list(converter.source_patterns)
                found.setdefault(name, {})[patterns.index(pattern)] = source
                counts[name] = len(patterns)
                break
    return {
        name: [parts[number] for number in range(counts[name])]
        for name, parts in found.items()
        if len(parts) == counts[name]
    }


def _name_part(own: str, number: int) -> str:
    return f"{own}_part_{number}"


def _split_parameter(module: Any, own: str, sizes: Sequence[int]) -> None:
    """Replace parameter ``own`` by parts of ``sizes`` rows, which a new class of it joins."""
    whole = module._parameters.pop(own)
    for number, rows in enumerate(torch.split(whole.data, list(sizes))):
        part = nn.Parameter(rows.clone(), requires_grad=whole.requires_grad)
        module.register_parameter(_name_part(own, number), part)
    names = [_name_part(own, number) for number in range(len(sizes))]

    def join(self: Any) -> Tensor:
        return torch.cat([getattr(self, name) for name in names])

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {own: property(join)})
