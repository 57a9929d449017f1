"""The parameters outside of the blocks that are gathered for the modules that read them.

The embedding and the head are the largest; tied, they are one unit with two modules, gathered for
each of them. Per-layer embeddings, projections and whatever else of a megabyte or more is frozen is
a unit of its own as well (``model.parameter_readers`` says of which modules). The rest, norms
mostly, stays with the root: a gather of its own would cost more than its bytes. So does an
embedding that the model's own code reads (Gemma 4: the row of the padding token).
"""

from dataclasses import dataclass, field

from torch import nn

from dist_peft.engine.mesh import list_end_modules
from dist_peft.model.parameter_readers import find_readers, is_read_by_root

__all__ = ["MIN_UNIT_BYTES", "OuterUnit", "list_outer_units"]

MIN_UNIT_BYTES = 2**20
"""Bytes of a unit that is neither embedding nor head."""


@dataclass
class OuterUnit:
    """Frozen parameters and the modules, one or more, in whose forwards they are read."""

    modules: tuple[nn.Module, ...]
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters)


def list_outer_units(model: nn.Module) -> list[OuterUnit]:
    """Return the units of ``model``, in its order; their parameters are whole in shape."""
    ends = list_end_modules(model)
    units: dict[tuple[int, ...], OuterUnit] = {}
    seen = set[int]()
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            readers = find_readers(owner, name)
            if readers is None and not is_read_by_root(
                owner, name
            ):  # no forward has told: embedding and head are called as any module
                holders = [m for m in ends if any(p is parameter for p in m._parameters.values())]
                readers = tuple(holders)
            if readers:
                key = tuple(sorted(id(module) for module in readers))
                units.setdefault(key, OuterUnit(readers)).parameters.append(parameter)
    return [
        unit
        for unit in units.values()
        if unit.num_bytes >= MIN_UNIT_BYTES or any(module in ends for module in unit.modules)
    ]
