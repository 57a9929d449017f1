"""Choose the tensors of a base that are hashed while they are read."""

from dist_peft.model.skeleton import Skeleton
from dist_peft.store.content import RowHashes

__all__ = ["build_row_hashes"]


def build_row_hashes(skeleton: Skeleton) -> RowHashes:
    """Return the hashes for a ``RowReader`` of the skeleton's files.

    Tensors that the model has as stored are hashed as they are; weights that a prequantized
    directory stores as several tensors, in the packed rows built from these.
    """
    files = skeleton.index.tensors
    plain = [spec for name, spec in skeleton.tensors.items() if files.get(name) == spec]
    names = {spec.name for spec in plain}
    packed = () if skeleton.prequantized is None else skeleton.prequantized.tensors
    others = [s for n, s in skeleton.tensors.items() if n in packed and n not in names]
    return RowHashes(plain, others)
