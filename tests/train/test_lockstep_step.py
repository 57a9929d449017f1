"""What needs no model; ``tests/app/sweep/test_point_step.py`` compares the gradients."""

from types import SimpleNamespace
from typing import Any

import pytest

from dist_peft.train.joined_step import AdapterWork
from dist_peft.train.lockstep_step import LockstepStep


def test_works_of_other_lengths_are_not_joined() -> None:
    none: Any = SimpleNamespace()
    step = LockstepStep(none, none, none, none, [], none)
    works = {k: AdapterWork(0, [none] * count, 1) for k, count in enumerate((2, 2, 3))}
    assert step.can_join({0: works[0], 1: works[1]})
    assert not step.can_join(works)
    with pytest.raises(AssertionError, match="get_models is given"):
        step.get_models(0)
