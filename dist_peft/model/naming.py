"""Map a model's parameters to the tensors of a base's files.

Names differ in three ways: families were renamed after their checkpoints were written
(``transformers`` knows how), checkpoints were saved from the headless model, and the experts of a
mixture lie in one tensor each where the model stacks them (``model.experts``)::

    model.layers.0.block_sparse_moe.experts.3.w1.weight  ->  rows of layer 0's gate_up_proj
    model.layers.0.mlp.experts.3.up_proj.weight          ->  rows of layer 0's gate_up_proj
    model.layers.0.mlp.experts.gate_up_proj              ->  all of it
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.span import Span
from dist_peft.model.expert_kinds import describe_experts
from dist_peft.model.frozen_linear import Pieces, StackPiece
from dist_peft.model.joined_weights import find_joined_linears, split_joined_weights
from dist_peft.model.prequantized.base import PrequantizedBase
from dist_peft.model.tensor_renaming import rename_tensor
from dist_peft.model.tied_weights import list_tied_names, untie_different_weights
from dist_peft.store.index import SafetensorsIndex, TensorInfo

__all__ = ["TensorNames", "find_tensor_names"]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class TensorNames:
    """Tensors of a model's parameters and persistent buffers.

    Attributes:
        tensors: full name -> tensor in the files; a packed weight under its name before packing.
            Experts are in ``stacks``.
        stacks: full name of a parameter of experts, or of a linear that the files have as several
            tensors -> the pieces that its rows come from.
        in_turn: parameters of ``stacks`` of which the files have rows of gate and up in turn.
        renamed: tensor in the files -> the name that it should have had: of a tied weight that was
            stored under the head's name only.
    """

    tensors: dict[str, str]
    stacks: dict[str, Pieces]
    renamed: dict[str, str] = field(default_factory=dict)
    in_turn: frozenset[str] = frozenset()

    @property
    def found_names(self) -> dict[str, str]:
        """Names of all parameters that were found, and of all pieces of stacks, -> a tensor."""
        pieces = {piece.name: piece.name for pieces in self.stacks.values() for piece in pieces}
        first = {name: pieces[0].name for name, pieces in self.stacks.items()}
        return {**self.tensors, **pieces, **first}


def find_tensor_names(
    model: PreTrainedModel,
    index: SafetensorsIndex,
    packed: PrequantizedBase | None,
    experts: Sequence[nn.Module],
    may_lack: Callable[[str], bool],
) -> TensorNames:
    """Find the tensors of ``model``. Parameters that the files lack, or have in another shape, are
    left out if ``may_lack`` allows it. Tied parameters that the files have with different values
    are untied.

    Args:
        experts: the modules whose parameters are stacks.

    Raises:
        UserError: tensors are absent or have another shape.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    tensors: Mapping[str, TensorInfo | None] = index.tensors if packed is None else packed.tensors
    in_files = _rename_tensors(tensors, renamings, model)
    in_files |= split_joined_weights(model, in_files, tensors, rules)
    in_turn = _find_rows_in_turn(in_files, rules) if experts else {}
    in_files |= in_turn
    stacks, absent, unread = _find_expert_stacks(model, index, tensors, in_files, rules, experts)
    stacks |= find_joined_linears(model, in_files, tensors, rules)
    prefix = model.base_model_prefix + "."

    def find_source(name: str) -> str | None:
        candidates = _candidate_names(name, prefix)
        return next((in_files[c] for c in candidates if c in in_files), None)

    def find_plain_source(name: str) -> str | None:
        source = find_source(name)
        return source if source in index.tensors else None

    untie_different_weights(model, index, find_plain_source)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    buffers = {name for name, _ in model.named_buffers()} & shapes.keys()
    tied = list_tied_names(model)
    names: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for name in [*dict(model.named_parameters()), *buffers]:
        if name in stacks or name in absent:
            continue
        if source := find_source(name):
            names[name] = source
        elif source := next(filter(None, map(find_source, tied.get(name, ()))), None):
            names[name], renamed[source] = source, name
        elif name not in buffers and not may_lack(name):
            # the buffer keeps the value computed by the model
            absent.append(name)
    if absent:
        raise _absent_tensors_error(model, index, in_files, rules, absent)
    turned = frozenset(n for n in stacks if in_turn.keys() & {*_candidate_names(n, prefix)})
    found = TensorNames(names, stacks, renamed, turned)
    used = {*found.found_names.values(), *unread}
    _warn_of_unused_tensors(model, index, tensors, used)
    for name, source in list(names.items()):
        info, shape = tensors[source], shapes[name]
        if info is not None and shape != info.shape:
            if may_lack(name):
                del names[name]  # the head of another set of classes
                continue
            raise _other_shape_error(source, info.shape, shape)
    return found


def _rename_tensors(
    tensors: Iterable[str], renamings: Sequence[WeightRenaming], model: PreTrainedModel
) -> dict[str, str]:
    """Return name in the model -> tensor in the files.

    Renamings are of names in published files. Where one changes a name that is the model's own into
    one that is not (DeepSeek-V4: ``model.norm`` to ``model.kv_norm``), the tensor keeps its name.
    """
    prefix = model.base_model_prefix + "."
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}

    def is_known(name: str) -> bool:
        return any(candidate in known for candidate in _candidate_names(name, prefix))

    found = {}
    for name in tensors:
        renamed = rename_tensor(name, renamings)
        keeps = renamed != name and is_known(name) and not is_known(renamed)
        found[name if keeps else renamed] = name
    return found


def _candidate_names(name: str, prefix: str) -> tuple[str, str, str]:
    """Return the possible names of a parameter in checkpoints of the full or headless model."""
    return name, name.removeprefix(prefix), prefix + name


def _absent_tensors_error(
    model: PreTrainedModel,
    index: SafetensorsIndex,
    in_files: Mapping[str, str],
    rules: Sequence[object],
    absent: Sequence[str],
) -> UserError:
    """Return the error about parameters ``absent`` from the files: an incomplete download, or
    tensors that ``transformers`` converts."""
    kind = f"base.path {index.path} of type {model.config.model_type!r}"
    for converter in (rule for rule in rules if isinstance(rule, WeightConverter)):
        for renamed, source in in_files.items():
            name, pattern = converter.rename_source_key(renamed)
            if pattern is not None and name in absent:
                how = ", ".join(type(operation).__name__ for operation in converter.operations)
                return UserError(
                    f"{kind} is not supported: transformers computes {name} from tensors such as "
                    f"{source} ({how}), a conversion that is not read row by row; write the "
                    "base converted, with transformers' "
                    "save_pretrained(..., save_original_format=False), or use another one"
                )
    return UserError(
        f"{index.path} lacks {len(absent)} tensors of a {type(model).__name__}, "
        f"such as {absent[0]}; is the download complete?"
    )


def _other_shape_error(source: str, found: Sequence[int], wanted: Sequence[int]) -> UserError:
    return UserError(
        f"tensor {source} has shape {list(found)} in the files but config.json asks for "
        f"{list(wanted)}"
    )


# -- experts -------------------------------------------------------------------------------------


def _find_expert_stacks(
    model: PreTrainedModel,
    index: SafetensorsIndex,
    tensors: Mapping[str, TensorInfo | None],
    in_files: Mapping[str, str],
    rules: Sequence[object],
    experts: Sequence[nn.Module],
) -> tuple[dict[str, Pieces], list[str], set[str]]:
    """Return ``TensorNames.stacks``, the parameters of experts that the files lack, and tensors of
    experts that compute without weights."""
    merged = _group_expert_tensors(in_files, rules) if experts else {}
    paths = {id(module): path for path, module in model.named_modules()}
    prefix = model.base_model_prefix + "."
    stacks: dict[str, Pieces] = {}
    absent: list[str] = []
    unread: set[str] = set()
    for module in experts:
        kind = describe_experts(module)
        assert kind is not None
        for own in kind.names:
            name, shape = f"{paths[id(module)]}.{own}", kind.find_stack_shape(module, own)
            stored = tuple(module.get_parameter(own).shape)
            for candidate in _candidate_names(name, prefix):
                if candidate in in_files:
                    parts = [[in_files[candidate]]]
                elif candidate in merged:
                    parts = merged[candidate]
                else:
                    continue
                if kind.form == "with_identities" and candidate in merged:
                    unread |= {name for part in parts for name in part[shape[0] :]}
                    parts = [part[: shape[0]] for part in parts]
                stacks[name] = _list_stack_pieces(
                    index, tensors, parts, shape, stored, own in kind.transposed
                )
                break
            else:
                absent.append(name)
    return stacks, absent, unread


def _group_expert_tensors(
    in_files: Mapping[str, str], rules: Sequence[object]
) -> dict[str, list[list[str]]]:
    """Return name of a stack -> for each of its projections, each expert's tensor."""
    found: dict[str, list[list[tuple[list[int], str]]]] = {}
    converters = [
        rule for rule in rules if isinstance(rule, WeightConverter) and _is_expert_merge(rule)
    ]
    for renamed, source in in_files.items():
        for converter in converters:
            name, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                patterns = converter.source_patterns
                parts = found.setdefault(name, [[] for _ in patterns])
                number = [int(digits) for digits in re.findall(r"\d+", source)]
                parts[patterns.index(pattern)].append((number, source))
                break
    return {
        name: [[source for _, source in sorted(part)] for part in parts]
        for name, parts in found.items()
    }


def _find_rows_in_turn(in_files: Mapping[str, str], rules: Sequence[object]) -> dict[str, str]:
    """Return name of a stack -> the tensor that has its rows of gate and up in turn."""
    found: dict[str, str] = {}
    for rule in rules:
        if not isinstance(rule, WeightConverter) or len(rule.target_patterns) > 1:
            continue
        kinds = [
            (type(o), vars(o).get("dim"), bool(vars(o).get("inverse"))) for o in rule.operations
        ]
        if kinds == [(Interleave, 1, False)]:
            for renamed, source in in_files.items():
                name, pattern = rule.rename_source_key(renamed)
                if pattern is not None and name not in in_files:
                    found[name] = source
    return found


def _is_expert_merge(rule: WeightConverter) -> bool:
    """Return whether the rule only stacks experts with concatenated projections."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    stacks = [(MergeModulelist, 0), (Concatenate, 1)][: 1 + (len(rule.source_patterns) > 1)]
    return kinds == stacks and len(rule.target_patterns) == 1


def _list_stack_pieces(
    index: SafetensorsIndex,
    tensors: Mapping[str, TensorInfo | None],
    parts: list[list[str]],
    shape: tuple[int, int, int],
    stored: tuple[int, ...],
    transposed: bool,
) -> Pieces:
    """Return the pieces of a stack [experts, out, in], from one tensor or those of ``_merged``.

    Args:
        shape: of the stack.
        stored: of the parameter; [experts, in, out] where ``transposed``.
    """
    experts, out, columns = shape
    first = tensors[parts[0][0]]
    stacked = experts > 1 or transposed or (first is not None and first.shape == stored)
    whole = stacked and parts == [[parts[0][0]]]
    if transposed and not whole:
        raise UserError(
            f"{index.path} has a tensor for each expert, such as {parts[0][0]}, of a family whose "
            "experts are stored transposed: a layout that is not read"
        )
    wanted = stored if whole else (out // len(parts), columns)
    rows = experts * out if whole else out // len(parts)
    for part in parts:
        if len(part) != (1 if whole else experts):
            raise UserError(
                f"{index.path} has {len(part)} experts next to {(part or parts[0])[0]} but "
                f"config.json asks for {experts}; is the download complete?"
            )
    ordered = [name for of_expert in zip(*parts, strict=True) for name in of_expert]
    for name in ordered:
        info = tensors[name]  # None: packed, and checked when it is opened
        if info is not None and info.shape != wanted:
            raise _other_shape_error(name, info.shape, wanted)
    return tuple(StackPiece(name, Span(i * rows, (i + 1) * rows)) for i, name in enumerate(ordered))


def _warn_of_unused_tensors(
    model: PreTrainedModel,
    index: SafetensorsIndex,
    tensors: Mapping[str, TensorInfo | None],
    used: set[str],
) -> None:
    """Warn of unused matrices, which a config.json of fewer layers would drop silently."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *(model._tied_weights_keys or ())]
    unused = [
        name
        for name, info in tensors.items()
        if name not in used
        and (info is None or (len(info.shape) == 2 and info.dtype.is_floating_point))
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if unused:
        log.warning(
            "%s has %d weights that a %s of this config.json does not use, such as %s",
            index.path,
            len(unused),
            type(model).__name__,
            unused[0],
            extra=ONCE,
        )
