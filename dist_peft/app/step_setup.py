"""Put together what computes a run's optimizer steps."""

from typing import Any

from torch import nn

from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import TrainConfig
from dist_peft.core.world import World
from dist_peft.data.loader import count_micro_batches
from dist_peft.model.embedding_noise import EmbeddingNoise
from dist_peft.train.gradient_watch import GradientWatch
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import Objective
from dist_peft.train.predicted_inputs import ScheduledSampling

__all__ = ["make_training_step"]


def make_training_step(
    train: TrainConfig,
    built: LoadedModel,
    call: nn.Module,
    objective: Objective[Any],
    world: World,
) -> TrainingStep:
    """Return the step of a loaded model, with a watch over its gradients: close it at the end.

    Args:
        call: module returned by ``LoadedModel.setup_optimizer``.
        objective: of the run's loaders.
    """
    return TrainingStep(
        built.model,
        call,
        built.engine,
        built.setup.adapter,
        objective,
        world,
        GradientWatch(built.setup.skeleton.blocks),
        EmbeddingNoise.from_config(built.model, train),
        sampling=ScheduledSampling.from_config(train.scheduled_sampling, train.seed),
        micro_batches=count_micro_batches(train.global_batch, train.micro_batch)
        if train.exact
        else None,
    )
