"""The tensors of a base as an export sees them: names, shapes, and the linear they belong to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.model.skeleton import Skeleton
from dist_peft.quant.codec import Codec
from dist_peft.store.format import TensorSpec

__all__ = ["BaseWeight", "list_base_weights"]


@dataclass(frozen=True)
class BaseWeight:
    """A tensor of the base.

    Attributes:
        info: name, type and shape in the files, or those of its substitute (``Skeleton.tensors``).
        path: its name in the model, such as ``model.layers.0.self_attn.q_proj.weight``.
        linear: the linear that owns it as its weight, the head included, a packed embedding, or the
            stack of experts that contains its rows; None for every other tensor.
        written: its name in the output: the name in the files, with the trunk's prefix added if
            the trunk was saved without its head.
        first: row of ``linear`` that corresponds to row 0 of the tensor.
        wide: output type of a tensor that must not be rounded to 16 bits; None: the format's type.
    """

    info: TensorSpec
    path: str
    linear: FrozenWeight | None
    written: str
    first: int = 0
    wide: torch.dtype | None = None

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
        """Name in the files without ``.weight``: the prefix of the names of packed tensors."""
        return self.info.name.removesuffix(".weight")

    @property
    def module_path(self) -> str:
        """Path of the module that owns the weight."""
        return self.path.rpartition(".")[0]

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

    @property
    def is_transposed(self) -> bool:
        """Whether rows of ``linear`` are columns of the tensor."""
        return isinstance(self.linear, ExpertStack) and self.linear.is_transposed

    def to_stored_shape(self, rows: Tensor) -> Tensor:
        """Rows of ``linear`` ``[n, in]`` -> rows of the tensor as it is written."""
        if not self.is_transposed:
            return rows.reshape(-1, *self.info.shape[1:])
        return rows.view(-1, self.info.shape[2], self.info.shape[1]).transpose(1, 2).contiguous()


def list_base_weights(skeleton: Skeleton) -> list[BaseWeight]:
    paths: dict[str, tuple[str, FrozenWeight | None]] = {}
    first: dict[str, int] = {}
    for path, module in skeleton.model.named_modules():
        for own, name in module.checkpoint_names.items():
            is_linear = isinstance(module, FrozenLinear | FrozenEmbedding) and own == "packed"
            linear = module if is_linear else None
            paths[name] = (f"{path}.{'weight' if is_linear else own}", linear)
        if isinstance(module, ExpertStack):
            for piece in module.pieces:
                paths[piece.name] = (f"{path}.weight", module)
                first[piece.name] = piece.span.start
        elif isinstance(module, FrozenLinear) and module.is_tied:  # files may have a copy for it
            paths.setdefault(f"{path}.weight", (f"{path}.weight", module))
    trunk = "" if skeleton.head is None else f"{skeleton.model.base_model_prefix}."
    found = []
    for name, info in skeleton.tensors.items():
        path, linear = paths.get(name, (name, None))
        headless = path.startswith(trunk) and not name.startswith(trunk)
        written = skeleton.renamed.get(name, f"{trunk}{name}" if headless else name)
        wide = skeleton.wide.get(name)
        found.append(BaseWeight(info, path, linear, written, first.get(name, 0), wide))
    return found
