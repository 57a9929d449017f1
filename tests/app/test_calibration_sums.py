from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_peft.app.calibration_sums import CalibrationSums
from dist_peft.core.errors import UserError
from dist_peft.core.world import World

SHAPES = {"a": (2, 2), "b": (3, 1), "c": (1, 1)}
BATCHES: Any = (1.0, 1e6, 2.0)  # the second one is beyond what the first one leaves room for


def make(passes: list[tuple[str, ...]], bytes_at_once: int = 2**20, scale: float = 1.0) -> Any:
    def run(names: Sequence[str], batch: Any) -> Mapping[str, Tensor]:
        passes.append(tuple(names))
        filled = {n: torch.full(SHAPES[n], scale * batch, dtype=torch.float64) for n in names}
        return {name: value for name, value in filled.items() if name != "c" or batch == 2.0}

    device = torch.device("cpu")
    return CalibrationSums(World(), device, BATCHES, run, 3, "adapter.init eva", bytes_at_once)


def find_all(sums: CalibrationSums) -> dict[str, list[float]]:
    sizes = dict.fromkeys(SHAPES, 1)
    results = sums.map_sums(SHAPES, sizes, lambda name, total: total.sum().float().view(1))
    return {name: result.tolist() for name, result in results}


def test_sums_and_passes() -> None:
    """A batch that does not reach a linear adds nothing; a sum that overflows is made again."""
    passes: list[tuple[str, ...]] = []
    expected = {"a": [4000012.0], "b": [3000009.0], "c": [2.0]}
    assert find_all(make(passes)) == expected
    assert passes == [("a", "b", "c")] * 6
    passes.clear()
    assert find_all(make(passes, bytes_at_once=4 * 24)) == expected
    assert passes == [("a",)] * 6 + [("b", "c")] * 6
    passes.clear()
    assert find_all(make(passes, bytes_at_once=1)) == expected
    assert set(passes) == {("a",), ("b",), ("c",)}


def test_errors_name_the_linear() -> None:
    with pytest.raises(UserError, match=r"adapter.init eva: .* infinite or NaN values in a;"):
        find_all(make([], scale=float("nan")))

    def refuse(name: str, total: Tensor) -> Tensor:
        raise ValueError("3 inputs are too few")

    with pytest.raises(UserError, match=r"adapter.init eva in a: 3 inputs .* adapter.init_samples"):
        list(make([]).map_sums(SHAPES, dict.fromkeys(SHAPES, 1), refuse))
