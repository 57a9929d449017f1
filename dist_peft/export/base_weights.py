"""The tensors of a base as an export sees them: names, shapes, and the linear they belong to."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.expert_names import list_expert_names
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.codec import Codec
from dist_peft.store.format import TensorSpec

__all__ = [
    "BaseWeight",
    "join_parts",
    "list_base_weights",
    "name_as_linears",
    "name_as_published",
    "name_by_modules",
    "split_experts",
    "split_stacks",
]

_PART = re.compile(r"_part_\d+$")


@dataclass(frozen=True)
class BaseWeight:
    """A tensor of the base.

    Attributes:
        info: name, type and shape in the files, or those of its substitute (``Skeleton.tensors``).
            Of a transposed weight in a matrix of the files: ``[E, in, out]``, one row an expert or
            linear.
        path: its name in the model, such as ``model.layers.0.self_attn.q_proj.weight``.
        linear: the linear that owns it as its weight, the head included, a packed embedding, or the
            stack of experts that contains its rows; None for every other tensor.
        written: its name in the output: the name in the files, with the trunk's prefix added if
            the trunk was saved without its head.
        first: row of ``linear`` that corresponds to row 0 of the tensor.
        wide: output type of a tensor that must not be rounded to 16 bits; None: the format's type.
        is_part: it is one expert's part of a tensor that has all of them (``split_stacks``).
        is_flat: it is a matrix in the files, one more row of which is in ``info``.
        is_dense: an expert's that the format leaves in the run's compute type.
        joined: first row in the written tensor, and that tensor's rows, where it has several
            tensors of the base (``join_parts``); None: it is this one.
    """

    info: TensorSpec
    path: str
    linear: FrozenWeight | None
    written: str
    first: int = 0
    wide: torch.dtype | None = None
    is_part: bool = False
    is_flat: bool = False
    is_dense: bool = False
    joined: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def is_block_linear(self) -> bool:
        """Whether this is the weight of a block's linear, which formats may pack; neither the head
        nor an embedding."""
        outside = self.linear is None or isinstance(self.linear, FrozenEmbedding)
        return not outside and self.linear is not None and not self.linear.is_head

    @property
    def codec(self) -> Codec | None:
        return None if self.linear is None else self.linear.codec

    @property
    def name_stem(self) -> str:
        """Name in the output without ``.weight``: the prefix of the names of packed tensors."""
        return self.written.removesuffix(".weight")

    @property
    def is_expert(self) -> bool:
        """Whether this is the weight of one expert, or of several in one tensor."""
        return isinstance(self.linear, ExpertStack)

    @property
    def module_path(self) -> str:
        """Path of the module that owns the weight."""
        return self.path.rpartition(".")[0]

    @property
    def experts_path(self) -> str:
        """Path of the module of all experts that this weight of one or of several belongs to."""
        return self.module_path.rpartition(".")[0]

    @property
    def first_written_row(self) -> int:
        """Row of the written tensor that corresponds to row 0."""
        return 0 if self.joined is None else self.joined[0]

    def plan_dense_tensors(self, dtype: torch.dtype) -> list[TensorSpec]:
        """Return the tensor that the weight is written as without packing; of several that are one
        tensor, the first has it."""
        if self.joined is None:
            return [TensorSpec(self.written, dtype, self.written_shape)]
        first, rows = self.joined
        return [TensorSpec(self.written, dtype, (rows, *self.info.shape[1:]))] * (first == 0)

    @property
    def num_rows(self) -> int:
        return self.info.num_rows

    @property
    def num_columns(self) -> int:
        """in_features of a linear or expert; of other tensors the size of the last dimension."""
        return self.info.shape[-1] if self.linear is None else self.linear.in_features

    def span_in_linear(self, span: Span) -> Span:
        """Map rows ``span`` to rows of ``linear``; a row of stacked experts is one expert."""
        height = torch.Size(self.info.shape[1:]).numel() // max(1, self.num_columns)
        return Span(self.first + span.start * height, self.first + span.stop * height)

    def find_expert(self) -> tuple[int, str]:
        """Return the number of the expert and the name of the projection, such as ``gate_proj``,
        of a weight that belongs to one expert."""
        stack = self.linear
        assert isinstance(stack, ExpertStack)
        assert self.is_part or len(stack.pieces) >= stack.experts
        expert, row = divmod(self.first, stack.out_features)
        name = self.module_path.rpartition(".")[2]
        if self.num_rows < stack.out_features:
            name = "up_proj" if row else "gate_proj"
        return expert, name

    @property
    def is_transposed(self) -> bool:
        """Whether rows of ``linear`` are columns of the tensor."""
        return self.linear is not None and self.linear.is_transposed and not self.is_part

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Of the tensor in the output."""
        shape = self.info.shape
        return (shape[0] * shape[1], *shape[2:]) if self.is_flat else shape

    def to_written_rows(self, rows: Tensor, start: int) -> tuple[Tensor, int]:
        """Rows from ``start`` on in the shape of ``info`` -> those of the tensor in the output."""
        return (rows.flatten(0, 1), start * self.info.shape[1]) if self.is_flat else (rows, start)

    def to_stored_shape(self, rows: Tensor) -> Tensor:
        """Rows of ``linear`` ``[n, in]`` -> rows of the tensor as it is written."""
        if not self.is_transposed:
            return rows.reshape(-1, *self.info.shape[1:])
        return rows.view(-1, self.info.shape[2], self.info.shape[1]).transpose(1, 2).contiguous()


def list_base_weights(skeleton: Skeleton, trained_names: Collection[str] = ()) -> list[BaseWeight]:
    """Return the base's tensors in the order of the files.

    Args:
        trained_names: tensors that were trained themselves: of a linear that is stored transposed,
            a tensor like any other.
    """
    paths: dict[str, tuple[str, FrozenWeight | None]] = {}
    first: dict[str, int] = {}
    for path, module in skeleton.model.named_modules():
        for own, name in module.checkpoint_names.items():
            is_linear = isinstance(module, FrozenLinear | FrozenEmbedding) and own == "packed"
            linear = module if is_linear else None
            paths[name] = (f"{path}.{'weight' if is_linear else own}", linear)
        if isinstance(module, FrozenWeight) and module.pieces:
            for piece in module.pieces:
                paths[piece.name] = (f"{path}.weight", module)
                first[piece.name] = piece.span.start
        elif isinstance(module, FrozenLinear) and module.is_tied:  # files may have a copy for it
            paths.setdefault(f"{path}.weight", (f"{path}.weight", module))
    trunk = "" if skeleton.head is None else f"{skeleton.model.base_model_prefix}."
    found = []
    for name, info in skeleton.tensors.items():
        path, linear = paths.get(name, (name, None))
        if name in trained_names and isinstance(linear, FrozenLinear) and linear.is_transposed:
            linear = None
        headless = path.startswith(trunk) and not name.startswith(trunk)
        written = skeleton.renamed.get(name, f"{trunk}{name}" if headless else name)
        wide = skeleton.wide.get(name)
        is_flat = linear is not None and linear.is_transposed and len(info.shape) == 2
        if is_flat and linear is not None:
            matrix = (linear.in_features, info.shape[1])
            info = TensorSpec(name, info.dtype, (info.shape[0] // matrix[0], *matrix))
        weight = BaseWeight(info, path, linear, written, first.get(name, 0), wide, is_flat=is_flat)
        found.append(weight)
    return found


NamedRows = list[tuple[str, Span]]
"""Names of tensors, and the rows of a stack that each has, in the order of rows."""


def name_as_published(weight: BaseWeight, skeleton: Skeleton) -> NamedRows | None:
    """Return the names that ``transformers`` gives the parts of a stack in files, if it has any."""
    stack = weight.linear
    assert isinstance(stack, ExpertStack)
    return list_expert_names(skeleton.model, weight.module_path, stack.experts, stack.out_features)


def name_as_linears(weight: BaseWeight, skeleton: Skeleton) -> NamedRows:
    """Return the names of a model whose experts are linears of their own, such as
    ``feed_forward.experts.3.gate_proj.weight``; rows of an expert's gate are before those of up."""
    stack = weight.linear
    assert isinstance(stack, ExpertStack)
    own = weight.module_path.rpartition(".")[2]
    renamed = not weight.written.endswith(f".{own}")  # Granite: input_linear.weight
    owner = weight.experts_path if renamed else weight.written.removesuffix(f".{own}")
    names = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
    rows = stack.out_features // len(names)
    return [
        (f"{owner}.{expert}.{name}.weight", Span(first, first + rows))
        for expert in range(stack.experts)
        for number, name in enumerate(names)
        for first in (expert * stack.out_features + number * rows,)
    ]


def split_stacks(
    weights: Sequence[BaseWeight],
    skeleton: Skeleton,
    name_rows: Callable[[BaseWeight, Skeleton], NamedRows | None] = name_as_published,
) -> list[BaseWeight]:
    """Return the weights with a tensor of all experts in parts, one for each expert and projection.

    Args:
        name_rows: ``name_as_published`` or ``name_as_linears``.

    Raises:
        UserError: there are no names of single experts for the model.
    """
    found: list[BaseWeight] = []
    for weight in weights:
        stack = weight.linear
        if not isinstance(stack, ExpertStack) or len(stack.pieces) >= stack.experts:
            found.append(weight)
            continue
        pieces = name_rows(weight, skeleton)
        if pieces is None:
            raise UserError(
                f"{skeleton.index.path} has the experts stacked, and transformers has no names of "
                f"single experts for {type(skeleton.model).__name__}, which readers want"
            )
        for name, span in pieces:
            spec = TensorSpec(name, weight.info.dtype, (len(span), stack.in_features))
            found.append(replace(weight, info=spec, written=name, first=span.start, is_part=True))
    return found


def split_experts(weights: Sequence[BaseWeight], *, halves: bool = False) -> list[BaseWeight]:
    """Return the weights with a tensor of all experts in parts, one for each expert, whose names
    are no files'; for readers that have the experts stacked in their own way.

    Args:
        halves: ``gate_proj`` and ``up_proj`` are parts of their own.
    """
    found: list[BaseWeight] = []
    for weight in weights:
        stack = weight.linear
        if not isinstance(stack, ExpertStack) or len(stack.pieces) >= stack.experts:
            found.append(weight)
            continue
        has_both = halves and weight.module_path.endswith(".gate_up_proj")
        rows = stack.out_features // 2 if has_both else stack.out_features
        for first in range(0, stack.experts * stack.out_features, rows):
            name = f"{weight.written}.{first}"
            spec = TensorSpec(name, weight.info.dtype, (rows, stack.in_features))
            found.append(replace(weight, info=spec, written=name, first=first, is_part=True))
    return found


def join_parts(weights: Sequence[BaseWeight]) -> list[BaseWeight]:
    """Return the weights with the parts of a joined one (``model.joined_weights``) as rows of one
    tensor, under the name that the model of ``transformers`` has for it.

    ``transformers`` drops such parts where it dequantizes compressed-tensors' packed formats, and
    loads the whole.
    """
    rows: dict[str, dict[str, int]] = {}
    for weight in weights:
        stem = _PART.sub("", weight.path)
        if stem != weight.path:
            rows.setdefault(stem, {})[weight.path] = weight.num_rows
    found = []
    for weight in weights:
        stem = _PART.sub("", weight.path)
        if stem == weight.path:
            found.append(weight)
            continue
        number = _number_part(weight.path)
        first = sum(count for path, count in rows[stem].items() if _number_part(path) < number)
        name = ".".join([weight.written.rsplit(".", 2)[0], *stem.rsplit(".", 2)[1:]])
        found.append(replace(weight, written=name, joined=(first, sum(rows[stem].values()))))
    return found


def _number_part(path: str) -> int:
    return int(path.rpartition("_")[2])


def name_by_modules(weights: Sequence[BaseWeight]) -> list[BaseWeight]:
    """Return the weights with the names of a model whose experts are linears, each its own.

    gptqmodel builds such a model and saves its names, ``mlp.experts.3.gate_proj``, whichever names
    the published files of the family have (Mixtral: ``block_sparse_moe.experts.3.w1``). It builds
    the whole of a model with towers, whose text model has a prefix in the files (Llama 4).
    """
    embeddings = [w for w in weights if w.path.endswith("embed_tokens.weight")]
    prefixes = [w.written.removesuffix(w.path) for w in embeddings if w.written.endswith(w.path)]
    prefix = prefixes[0] if prefixes else ""
    return [replace(weight, written=_find_module_name(weight, prefix)) for weight in weights]


def _find_module_name(weight: BaseWeight, prefix: str) -> str:
    stack = weight.linear
    if isinstance(stack, ExpertStack):
        expert, name = weight.find_expert()
        return f"{prefix}{weight.experts_path}.{expert}.{name}.weight"
    return weight.written if weight.written.endswith(weight.path) else f"{prefix}{weight.path}"
