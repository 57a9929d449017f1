"""How the gradients and held-out losses of a sweep's points are computed together."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import cast

from torch import nn

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.app.model_setup import LoadedModel
from dist_peft.app.sweep.point_model import call_points_together
from dist_peft.core.world import World
from dist_peft.data.loader import count_micro_batches
from dist_peft.engine.mesh import list_end_modules
from dist_peft.engine.outer_units import list_outer_units
from dist_peft.train.joined_step import JoinedStep
from dist_peft.train.lockstep_step import LockstepStep
from dist_peft.train.objective import TokenObjective

__all__ = ["list_gathered_units", "make_joined_step"]


def make_joined_step(
    built: LoadedModel,
    trainings: Sequence[AdapterTraining],
    units: Sequence[nn.Module],
    world: World,
) -> JoinedStep:
    """Return the step of all points: in lockstep with ``train.exact``, else of joined batches.

    Args:
        built: with all adapters.
        trainings: of the points, by their numbers.
        units: of the model.
    """
    adapter, train = cast(JoinedAdapter, built.setup.adapter), built.setup.config.train
    objective = cast(TokenObjective, trainings[0].loaders.objective)  # others are refused
    shared = (built.model, built.engine, objective, world, adapter.adapters, adapter.shares)

    def get_models(number: int) -> tuple[nn.Module, nn.Module]:
        return trainings[number].built.model, trainings[number].call

    def enter_pass(numbers: Sequence[int]) -> AbstractContextManager[nn.Module]:
        return call_points_together(built.model, [get_models(number) for number in numbers])

    if not train.exact:
        return JoinedStep(*shared, enter_pass=enter_pass)
    micro_batches = count_micro_batches(train.global_batch, train.micro_batch)
    return LockstepStep(
        *shared, micro_batches=micro_batches, units=tuple(units), get_models=get_models
    )


def list_gathered_units(built: LoadedModel) -> list[nn.Module]:
    """Return the modules that engines gather as units, before an optimizer hides parameters."""
    outer = [module for unit in list_outer_units(built.model) for module in unit.modules]
    return [*built.setup.skeleton.blocks, *list_end_modules(built.model), *outer]
