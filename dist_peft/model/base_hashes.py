"""Choose the tensors of a base that are hashed while they are read."""

from collections.abc import Collection

from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.skeleton import Skeleton
from dist_peft.store.content import RowHashes
from dist_peft.store.format import TensorSpec

__all__ = ["build_row_hashes"]


def build_row_hashes(skeleton: Skeleton, trained_names: Collection[str] = ()) -> RowHashes:
    """Return the hashes for a ``RowReader`` of the skeleton's files.

    Args:
        trained_names: tensors that were trained themselves, which are read as they are stored.

    Tensors that the model has as stored are hashed as they are; weights that a prequantized
    directory stores as several tensors, in the packed rows built from these; experts and linears
    that are stored transposed, in the rows of their products.
    """
    files = skeleton.index.tensors
    turned: dict[str, TensorSpec] = {}
    rows: dict[str, TensorSpec] = {}
    for module in (m for m in skeleton.model.modules() if isinstance(m, ExpertStack)):
        for piece in module.pieces:
            shape = (len(piece.span), module.in_features)
            spec = TensorSpec(piece.name, skeleton.tensors[piece.name].dtype, shape)
            (turned if module.is_transposed and module.stored is None else rows)[piece.name] = spec
    linears = (m for m in skeleton.model.modules() if isinstance(m, FrozenLinear))
    for linear in linears:
        if linear.is_transposed and linear.source not in trained_names:
            shape = (linear.out_features, linear.in_features)
            dtype = skeleton.tensors[linear.source].dtype
            turned[linear.source] = TensorSpec(linear.source, dtype, shape)
    plain = [
        spec
        for name, spec in skeleton.tensors.items()
        if files.get(name) == spec and name not in turned
    ]
    names = {spec.name for spec in plain} | turned.keys()
    packed = () if skeleton.prequantized is None else skeleton.prequantized.tensors
    others = [rows.get(n, s) for n, s in skeleton.tensors.items() if n in packed and n not in names]
    return RowHashes(plain, [*others, *turned.values()])
