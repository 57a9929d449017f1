"""Apply the renamings that ``transformers`` keeps for families whose tensors were renamed.

Each renaming has the method ``rename_source_key(name) -> (new name, pattern or None)`` in every
version from 5.16 on. The function ``apply_renamings``, which calls them in turn, came with 5.20.
"""

from collections.abc import Iterable
from typing import Any, Protocol

__all__ = ["TensorRenaming", "rename_tensor"]


class TensorRenaming(Protocol):
    """A ``transformers.core_model_loading.WeightRenaming``."""

    def rename_source_key(self, source_key: str) -> tuple[str, Any]:
        """Return the new name, and the pattern that matched; the old name and None without one."""


def rename_tensor(name: str, renamings: Iterable[TensorRenaming]) -> str:
    """Return the name of a file's tensor in the model: every renaming that matches, in order."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
