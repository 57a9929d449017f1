"""Which tensors of a base are hashed while they are read, and how."""

from dist_peft.model.skeleton import Skeleton
from dist_peft.store.content import RowHashes

__all__ = ["row_hashes"]


def row_hashes(skeleton: Skeleton) -> RowHashes:
    """For a ``RowReader`` of the skeleton's files.

    Tensors that the model has as the files have them are hashed as they are; weights that a
    prequantized directory has in several tensors, in the packed rows that are made of these.
    """
    files = skeleton.index.tensors
    plain = [spec for name, spec in skeleton.tensors.items() if files.get(name) == spec]
    names = {spec.name for spec in plain}
    packed = () if skeleton.prequantized is None else skeleton.prequantized.tensors
    others = [s for n, s in skeleton.tensors.items() if n in packed and n not in names]
    return RowHashes(plain, others)
