"""An adapter to train with everything known before loading, and the ends of its training."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from torch import nn

from dist_peft.app.base_content import BaseRequirement, read_checkpoint_bases
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model
from dist_peft.app.model_setup import LoadedModel, ModelSetup, replace_labels
from dist_peft.app.resuming import read_run_inputs
from dist_peft.app.run_directory import write_run_config
from dist_peft.app.run_identity import count_total_steps
from dist_peft.app.trainer import Trainer
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.stop_signals import RESUMABLE
from dist_peft.core.world import World
from dist_peft.data.labels import list_class_names
from dist_peft.train.checkpoint import CheckpointManager

__all__ = ["AdapterJob", "begin_training", "end_training"]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class AdapterJob:
    """An adapter to train: of the run, of one task or of a point of a sweep.

    Attributes:
        loaders: of its data.
        resume_from: checkpoint that its training continues from; None: it starts.
        trained_on: base of that checkpoint.
        phase_end: after how many steps the base is loaded again in another form.
    """

    config: RunConfig
    loaders: DataLoaders
    checkpoints: CheckpointManager
    resume_from: Path | None
    trained_on: list[BaseRequirement]
    phase_end: int

    @classmethod
    def check_inputs(cls, config: RunConfig, setup: ModelSetup, world: World, resume: str) -> Self:
        """Read the data, select the checkpoint to resume and prepare the layers for its step.

        Args:
            resume: as ``config.resume``.

        Raises:
            UserError: on every rank: unfit data, other data on another rank, or a checkpoint that
                does not exist or is of another run.
        """
        directory = Path(config.save.dir) / "checkpoints"
        checkpoints = CheckpointManager(
            directory,
            config.save.keep,
            world,
            asynchronous=config.save.asynchronous,
            keep_best=config.save.keep_best,
        )
        resume_from = checkpoints.select_checkpoint(resume)
        resumed = [] if resume_from is None else [resume_from]
        # first of all comparisons with the checkpoint, since it names the keys of config.json
        with world.raise_together("compare the base with that of the checkpoint"):
            trained_on = read_checkpoint_bases(
                resumed, setup.skeleton.index, setup.config.base.quant
            )
        loaders = read_run_inputs(config, setup, world, resume_from)
        check_loaders_fit_model(loaders, setup.skeleton, setup.adapter.num_extra_positions)
        with world.raise_together("prepare the layers"):
            done = 0 if resume_from is None else checkpoints.read_position(resume_from).step
            total = count_total_steps(config, loaders)
            phase_end = setup.adapter.prepare_phase(done, total)
            if phase_end < total:
                _check_phases(config)
        return cls(config, loaders, checkpoints, resume_from, trained_on, phase_end)

    def make_trainer(
        self, built: LoadedModel, call: nn.Module, world: World, name: str = ""
    ) -> Trainer:
        """Return the trainer of the loaded model ``built``."""
        built = replace_labels(built, list_class_names(self.config.data))
        directory = Path(self.config.save.dir)
        return Trainer(
            self.config,
            *(world, built, call, self.loaders, self.checkpoints, directory),
            phase_end=self.phase_end,
            name=name,
        )


def _check_phases(config: RunConfig) -> None:
    """Refuse what does not go with a first phase that the method has chosen itself."""
    try:
        config.check_start("lora")
    except ValueError as error:
        raise UserError(str(error)) from None


def begin_training(trainer: Trainer, resume_from: Path | None, world: World) -> int:
    """Start or resume a run and write its ``config.yaml``; return the number of steps done."""
    first_step = (
        trainer.resume_from_checkpoint(resume_from)
        if resume_from is not None
        else trainer.start_run()
    )
    world.run_on_first(
        "write config.yaml", partial(write_run_config, trainer.run_dir, trainer.config)
    )
    return first_step


def end_training(trainer: Trainer, done: int) -> int | None:
    """Write the results of a training that ended after step ``done``, if it is complete.

    Returns:
        The exit code; None at the end of a phase that is not the last.
    """
    if trainer.is_phase_over:
        log.info("step %d: the base is loaded again, in its own format", done)
        return None
    if trainer.stopped_early:
        log.info(
            "step %d: train.early_stop: %d evaluations without a better held-out %s",
            done,
            trainer.config.train.early_stop,
            trainer.config.train.metric_for_best,
        )
    elif done < trainer.total_steps or trainer.evaluation_stopped:
        text = "stopped on a signal after step %d; rerun the same command to resume"
        log.warning(text, done, extra=ONCE)
        return RESUMABLE
    with enter_phase("write the results", SETUP_PATIENCE):
        trainer.finish_run()
    return 0
