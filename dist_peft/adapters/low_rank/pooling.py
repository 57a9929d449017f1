"""How QA-LoRA implementations pool their input, and how they differ.

With groups of ``g`` inputs and ``L = in / g`` of them, three programs compute, from the same file,
three different things::

    sum    y += s B A sum(x)               the paper's algorithm 1, and this project
    mean   y += s B A mean(x)              the authors' repository: 1/g of it
    peft   y += s B A mean(x) * L          PEFT 0.21: L/g of it (1/g for the mean, times L)

so that a factor on ``B`` brings one into another. PEFT's ``L`` is the number of groups where the
paper has their size; the two agree only where ``in = g^2``. The factor belongs to a module, since
``in`` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dist_peft.core.errors import UserError

__all__ = [
    "POOL_KEY",
    "SIZE_KEY",
    "Convention",
    "Pooling",
    "pooling_sum_factor",
    "read_pooling_facts",
]

Convention = Literal["sum", "mean", "peft"]

POOL_KEY = "qalora_pool"
SIZE_KEY = "qalora_group_size"
_PEFT_DEFAULT_SIZE = 16


@dataclass(frozen=True)
class Pooling:
    """Groups of ``size`` inputs, pooled by ``convention``."""

    size: int
    convention: Convention


def pooling_sum_factor(pooling: Pooling, groups: int) -> float:
    """Return the factor on ``B`` that makes the factors equal under the sum convention.

    Args:
        pooling: of the factors as they are.
        groups: ``L``, the columns of ``A``.
    """
    match pooling.convention:
        case "sum":
            return 1.0
        case "mean":
            return 1 / pooling.size
        case "peft":
            return groups / pooling.size


def read_pooling_facts(config: Mapping[str, Any]) -> Pooling | None:
    """How the adapter of an ``adapter_config.json`` pools; None for plain LoRA.

    ``use_qalora`` without ``qalora_pool`` is PEFT's own file. A file of the authors' repository
    says nothing: its user adds ``use_qalora: true``, ``qalora_group_size``, ``qalora_pool: mean``.

    Raises:
        UserError: unusable values.
    """
    if config.get("peft_type") != "QALORA" and not config.get("use_qalora"):
        return None
    size = config.get(SIZE_KEY, _PEFT_DEFAULT_SIZE)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{SIZE_KEY} is {size!r}, not a number of inputs")
    convention = config.get(POOL_KEY, "peft" if config.get("use_qalora") else None)
    if convention not in get_args(Convention):
        raise UserError(
            f"{POOL_KEY} is {convention!r}, not one of {', '.join(get_args(Convention))}: it says "
            "how the program that trained the adapter pools its inputs"
        )
    return Pooling(size, convention)
