"""Replace linears, experts and, by option, the input embedding and the output head of a model on
``meta`` by packed ones.

Which linears: ``nn.Linear`` and those of its subclasses that compute the same (Falcon writes
``x @ W.T + b``), and GPT-2's ``Conv1D``, whose weight is ``[in, out]``: its packed rows are columns
in the files (``FrozenWeight.is_transposed``). Other classes are left unchanged.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_peft.core.errors import UserError
from dist_peft.model.expert_kinds import describe_experts, find_activation, find_own_gate
from dist_peft.model.expert_variants import EXPERT_CLASSES
from dist_peft.model.experts import ExpertStack, StoredPieces
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight, Pieces
from dist_peft.model.naming import TensorNames
from dist_peft.model.prequantized.base import PrequantizedBase
from dist_peft.model.prequantized.column_order import share_stack_codec
from dist_peft.quant.codec import Codec, RawCodec

__all__ = [
    "FrozenReplacement",
    "check_base_is_packed",
    "check_embeddings_are_packed",
    "compute_packed_share",
    "freeze_embeddings",
    "freeze_experts",
    "freeze_linears",
    "is_plain_linear",
]


@dataclass(frozen=True)
class FrozenReplacement:
    """A frozen child of ``parent``: the module that ``transformers`` built, and its replacement.

    ``path``: of the child in the model.
    """

    parent: nn.Module
    path: str
    original: nn.Module
    frozen: nn.Module

    @property
    def module_kind(self) -> str:
        """The path with layer numbers removed: ``model.layers.*.mlp.up_proj``."""
        return re.sub(r"\d+", "*", self.path)

    @property
    def is_end(self) -> bool:
        """Whether this is the input embedding or the output head."""
        frozen = self.frozen
        return isinstance(frozen, FrozenEmbedding) or (
            isinstance(frozen, FrozenLinear) and frozen.is_head
        )

    def restore_original(self) -> None:
        setattr(self.parent, self.path.rpartition(".")[2], self.original)

    def install_frozen(self) -> None:
        setattr(self.parent, self.path.rpartition(".")[2], self.frozen)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x W^T + b`` and nothing else.

    A subclass of ``nn.Linear`` with a forward of its own is tried with small numbers, exactly
    (integers in float64), on inputs of two and three dimensions.
    """
    if not isinstance(module, nn.Linear):
        return False
    if type(module) is nn.Linear:
        return True
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    probe = copy.copy(module)
    probe.__dict__ = {**module.__dict__, "in_features": 3, "out_features": 5}
    weight = torch.arange(15.0, dtype=torch.float64).view(5, 3) - 7
    bias = None if module.bias is None else torch.arange(5.0, dtype=torch.float64)
    probe.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight, False),
        "bias": None if bias is None else nn.Parameter(bias, False),
    }
    try:
        for shape in ((4, 3), (2, 2, 3)):
            x = torch.arange(12.0, dtype=torch.float64).view(shape) - 5
            found = probe(x)
            if not isinstance(found, torch.Tensor) or not torch.equal(
                found, F.linear(x, weight, bias)
            ):
                return False
    except Exception:  # code of any model: a module that fails is not a plain linear
        return False
    return True


def _find_linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``[out, in]`` of a linear or ``Conv1D``; None: ``module`` is neither."""
    if type(module) is Conv1D:
        return module.nf, module.nx
    if isinstance(module, nn.Linear) and is_plain_linear(module):
        return module.out_features, module.in_features
    return None


def freeze_linears(
    model: nn.Module,
    blocks: list[nn.Module],
    found: TensorNames,
    codec: Codec,
    dtype: torch.dtype,
    packed: PrequantizedBase | None,
    tied: bool,
    learning: Sequence[str],
    plain: set[int],
) -> list[FrozenReplacement]:
    """Replace linears of the blocks by packed ones; an untied head is frozen unquantized.

    ``learning``: paths of trainable modules, left out. ``plain``: ``id`` of linears left unchanged:
    routers, and those whose weight other modules read. Linears in float32 of a 16-bit model are
    left unchanged too, since no packed type holds them.

    Of a prequantized base, linears whose plain weight is in the files stay unquantized too.
    """
    raw = RawCodec(dtype)
    replaced: list[FrozenReplacement] = []
    in_blocks = {id(m) for block in blocks for m in block.modules()}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if (shape := _find_linear_shape(child)) is None or id(child) in plain:
                continue
            weight, bias = child.get_parameter("weight"), child._parameters.get("bias")
            if weight.dtype != dtype:
                continue
            if f"{path}.{name}".lstrip(".") in learning:
                continue
            inside = id(child) in in_blocks
            if not inside and tied:
                continue  # shares the parameter of the embedding, which is not a linear
            full = f"{path}.{name}.weight".lstrip(".")
            source = found.tensors.get(full)
            stored = packed.open_linear(source, *shape) if packed and source and inside else None
            frozen = FrozenLinear(
                shape[1],
                shape[0],
                (codec if inside else raw) if stored is None else stored.codec,
                bias=bias is not None,
                bias_dtype=dtype if bias is None else bias.dtype,
                source="",
                device="meta",
                stored=stored,
            )
            frozen.is_head = not inside
            frozen.is_transposed = isinstance(child, Conv1D)
            frozen.pieces = found.stacks.get(full, ())
            if frozen.is_transposed and stored is not None:
                raise UserError(
                    f"{source} is quantized in the files and belongs to a Conv1D, whose weights "
                    "are read unquantized only; give the unquantized base"
                )
            replaced.append(FrozenReplacement(parent, f"{path}.{name}".lstrip("."), child, frozen))
            replaced[-1].install_frozen()
    return replaced


def freeze_experts(
    model: nn.Module,
    experts: Sequence[nn.Module],
    names: TensorNames,
    codec: Codec,
    packed: PrequantizedBase | None,
) -> list[FrozenReplacement]:
    """Replace experts by ones packed with the base's codec, or with that of a prequantized base.

    Raises:
        UserError: only some of a stack's tensors are quantized in the files, or not alike.
    """
    replaced: list[FrozenReplacement] = []
    paths = {id(module): path for path, module in model.named_modules()}
    for module in experts:
        stacks: dict[str, ExpertStack] = {}
        kind = describe_experts(module)
        assert kind is not None
        turned = names.in_turn & {f"{paths[id(module)]}.{own}" for own in kind.names}
        for own in kind.names:
            count, out, columns = kind.find_stack_shape(module, own)
            source = f"{paths[id(module)]}.{own}"
            pieces = names.stacks[source]
            stored = None if packed is None else _open_packed_pieces(packed, pieces, columns)
            chosen = codec if stored is None else stored.codec
            stacks[own] = ExpertStack(count, columns, out, chosen, source, "meta", stored)
            stacks[own].pieces = pieces
            stacks[own].is_transposed = own in kind.transposed
            stacks[own].limit = _IN_TURN if turned else kind.limit
        parent, _, own = paths[id(module)].rpartition(".")
        bias = module._parameters.get(f"{kind.names[0]}_bias")
        frozen = EXPERT_CLASSES[kind.form](
            stacks,
            act_fn=find_activation(module),
            apply_gate=_find_gate(module, in_turn=bool(turned)),
            bias_dtype=None if bias is None else bias.dtype,
        )
        replaced.append(
            FrozenReplacement(model.get_submodule(parent), paths[id(module)], module, frozen)
        )
        replaced[-1].install_frozen()
    return replaced


_IN_TURN = (
    "its files have gate and up rows in turn, and transformers one after the other; write the base "
    "converted, with transformers' save_pretrained(..., save_original_format=False)"
)


def _find_gate(module: nn.Module, *, in_turn: bool) -> Callable[[Tensor], Tensor] | None:
    """Return the function between the products; None: the usual one.

    Args:
        in_turn: the first product has values of gate and up in turn.
    """
    gate = find_own_gate(module)
    if not in_turn:
        return gate
    activation = find_activation(module)

    def apply_gate(gate_up: Tensor) -> Tensor:
        one, other = gate_up[..., ::2], gate_up[..., 1::2]
        if gate is not None:
            found: Tensor = gate(torch.cat((one, other), -1))
            return found
        assert activation is not None
        usual: Tensor = activation(one) * other
        return usual

    return apply_gate


def _open_packed_pieces(
    packed: PrequantizedBase, pieces: Pieces, columns: int
) -> StoredPieces | None:
    """Return the reader of a stack's rows in a prequantized base; None: they are not quantized."""
    opened = [packed.open_linear(piece.name, len(piece.span), columns) for piece in pieces]
    found = share_stack_codec([linear for linear in opened if linear is not None])
    if not found:
        return None
    if len(found) < len(pieces) or len({linear.codec for linear in found}) > 1:
        plain = next((p.name for p, one in zip(pieces, opened, strict=True) if one is None), None)
        why = f": {plain} is not quantized" if plain else ""
        raise UserError(
            f"{packed.format_label}: the experts next to {pieces[0].name} are not all stored alike"
            f"{why}; give the unquantized base"
        )
    return StoredPieces(tuple((p.span, one) for p, one in zip(pieces, found, strict=True)))


def freeze_embeddings(
    model: PreTrainedModel, codec: Codec, dtype: torch.dtype, plain: set[int], path: str
) -> list[FrozenReplacement]:
    """Replace the input embedding and the output head by packed ones; tied ones share a parameter.

    Args:
        dtype: of the model; a weight that its family keeps in another type is refused.
        plain: ``id`` of linears whose weight other modules read.
        path: ``base.path``, for messages.

    Raises:
        UserError: one of them is of another kind, or its weight has further users.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise _refuse_embeddings(path, f"its input embedding is a {type(embedding).__name__}")
    if not isinstance(head, nn.Linear) or not is_plain_linear(head) or id(head) in plain:
        raise _refuse_embeddings(path, "its output head is more than a linear")
    if {embedding.weight.dtype, head.weight.dtype} != {dtype}:
        raise _refuse_embeddings(path, f"they are not kept in {str(dtype).removeprefix('torch.')}")
    weights = {id(embedding.weight), id(head.weight)}
    holders = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if weights & {id(p) for p in child._parameters.values()}
    ]
    if len(holders) != 2:
        raise _refuse_embeddings(path, "other modules use their weights")
    frozen_embedding = FrozenEmbedding(embedding, codec)
    frozen_head = FrozenLinear(
        head.in_features,
        head.out_features,
        codec,
        bias=head.bias is not None,
        bias_dtype=dtype if head.bias is None else head.bias.dtype,
        source="",
        device="meta",
    )
    frozen_head.is_head = True
    if head.weight is embedding.weight:
        frozen_head.packed = frozen_embedding.packed
        frozen_head.is_tied = True
    paths = {id(module): name for name, module in model.named_modules()}
    replaced = [
        FrozenReplacement(
            parent,
            paths[id(child)],
            child,
            frozen_embedding if child is embedding else frozen_head,
        )
        for parent, _, child in holders
    ]
    for one in replaced:
        one.install_frozen()
    return replaced


def check_embeddings_are_packed(model: PreTrainedModel, path: str) -> None:
    """Check that the model's forward, once tried, left both ends packed.

    Raises:
        UserError: code of the model reads a weight of them.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(isinstance(end, FrozenWeight) for end in ends):
        raise _refuse_embeddings(path, "other code reads their weights")


def _refuse_embeddings(path: str, reason: str) -> UserError:
    return UserError(
        f"base.quant.embeddings cannot pack the input embedding and output head of {path}: "
        f"{reason}; set it to false"
    )


def check_base_is_packed(model: nn.Module, blocks: Sequence[nn.Module], path: str) -> None:
    """Check that ``base.quant``, which is set, packs at least one weight.

    Raises:
        UserError: no linear of a block is packed; the message names the classes in the blocks.
    """
    if any(
        isinstance(module, FrozenWeight) and module.codec.is_quantized
        for block in blocks
        for module in block.modules()
    ):
        return
    classes = {
        type(module).__name__
        for block in blocks
        for module in block.modules()
        if any(p.dim() == 2 for p in module.parameters(recurse=False))
    }
    raise UserError(
        f"base.quant packs nothing of {path}: the matrices of {type(model).__name__}'s blocks are "
        f"in modules of class {', '.join(sorted(classes)) or 'none'}, and only linears (nn.Linear, "
        "Conv1D and classes that compute the same) are packed and adapted; set base.quant: null "
        "and adapter.kind: full to train it unquantized, or use another base"
    )


def compute_packed_share(model: nn.Module) -> float:
    """Return the share of the model's bytes that are packed weights, 0 to 1."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    packed = {
        id(module.packed): module.packed.numel()
        for module in model.modules()
        if isinstance(module, FrozenWeight) and module.codec.is_quantized
    }
    return sum(packed.values()) / max(1, sum(sizes.values()))
