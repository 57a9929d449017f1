"""``dist-peft eval``: held-out loss of a base, or of a run's newest state; multiple choice."""

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.base_content import read_checkpoint_bases
from dist_peft.app.config_arguments import add_config_arguments
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model, make_choice_loader
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
    load_training_state,
    load_weights,
    replace_labels,
)
from dist_peft.app.quantized_base import use_solved_base_of_run
from dist_peft.app.resuming import make_dated_loaders
from dist_peft.app.run_identity import describe_rank_inputs, flatten_rank_config
from dist_peft.app.tasks import list_task_runs, split_task_configs
from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.data.labels import list_class_names
from dist_peft.data.multiple_choice import read_choice_questions
from dist_peft.train.checkpoint import CheckpointManager, RunPosition
from dist_peft.train.evaluate import evaluate_model
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.option_scores import evaluate_choices

__all__ = ["add_arguments", "run"]

log = logging.getLogger("dist_peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft eval``."""
    add_config_arguments(parser)
    parser.add_argument("--run", type=Path, dest="run_dir", help="use this run's newest state")
    parser.add_argument(
        "--choices",
        type=Path,
        action="append",
        metavar="FILE",
        help="also answer the multiple-choice questions of a JSON Lines file; may be repeated",
    )


def run(args: argparse.Namespace, world: World) -> int:
    """Evaluate and print one JSON line; return 0.

    The line is ``{"eval_loss": nats, "step": steps trained}``, with ``eval_by_task`` for several
    held-out sources, the accuracies of each file of ``--choices``, and ``eval_accuracy`` and
    ``eval_macro_f1`` of a classifier.

    For a run of separate tasks it is ``{"adapters": {NAME: the above}, "own": {NAME: loss}}``; the
    base is loaded once. ``own`` is each adapter's loss on the held-out source of its task. A
    classifier, which has the labels of its task only, is evaluated on that source only.

    Raises:
        UserError: no held-out data, no complete checkpoint, or a checkpoint of another base.
    """
    config = load_config(args.config, args.overrides)
    if not config.data.eval:
        raise UserError(
            "data.eval is empty: nothing to evaluate; name a held-out file in data.eval"
        )
    if args.choices and config.data.is_classification:
        raise UserError("--choices asks a language model; with base.head classifier leave it out")
    runs = {} if args.run_dir is None else list_task_runs(args.run_dir)
    if not runs:
        ready = _setup_evaluation({"": config}, args.run_dir, {"": args.run_dir}, world)
        found = _evaluate_adapter(ready, "", args.choices, world)
    else:
        ready = _setup_evaluation(_select_task_configs(config, runs), args.run_dir, runs, world)
        found = {"adapters": {}, "own": {}}
        for name in runs:
            ready.bank.activate_adapter(name)
            found["adapters"][name] = _evaluate_adapter(ready, name, args.choices, world)
            if (
                own := _select_task_loss(ready.configs[name], name, found["adapters"][name])
            ) is not None:
                found["own"][name] = own
    if world.is_first:
        print(json.dumps(found))
    return 0


def _select_task_configs(config: RunConfig, runs: Iterable[str]) -> dict[str, RunConfig]:
    """Return the configuration to evaluate each task's adapter with.

    It has all held-out sources; for a classifier, which has the labels of its task only, those of
    its task.
    """
    if not config.data.is_classification:
        return dict.fromkeys(runs, config)
    tasks = split_task_configs(config)
    if unknown := set(runs) - set(tasks):
        raise UserError(f"data.train of --config has no task {sorted(unknown)[0]}, the run has")
    return {name: tasks[name] for name in runs}


def _evaluate_adapter(
    ready: "_EvaluationSetup", name: str, choices: Sequence[Path] | None, world: World
) -> dict[str, Any]:
    """Evaluate the active adapter, called ``name``, and return its JSON fields."""
    built, rows = ready.built, ready.loaders[name].eval
    found: dict[str, Any] = {}
    if rows is not None:
        found |= evaluate_model(built.model, built.engine, rows, world).to_metric_fields()
    found["step"] = ready.steps.get(name, 0)
    if choices:
        config = ready.configs[name]
        found["choices"] = {str(f): _evaluate_choices(f, config, built, world) for f in choices}
    return found


def _select_task_loss(config: RunConfig, name: str, found: dict[str, Any]) -> float | None:
    """Return the loss on the held-out source of task ``name``, if there is one."""
    loss: float | None = found.get("eval_by_task", {}).get(name)
    if [source.task_name for source in config.data.eval] == [name]:
        loss = found["eval_loss"]
    return loss


def _evaluate_choices(
    file: Path, config: RunConfig, built: LoadedModel, world: World
) -> dict[str, Any]:
    with world.raise_together("read questions"):
        questions = read_choice_questions(file)
        extra = built.adapter.num_extra_positions
        loader = make_choice_loader(
            config, questions, built.skeleton, built.tokenizer, world, extra
        )
    return asdict(evaluate_choices(built.model, built.engine, questions, loader, world))


@dataclass(frozen=True)
class _EvaluationSetup:
    """A loaded model and, by adapter name, configurations, data loaders and trained steps.

    A base without a run, and an ordinary run, have one adapter, named "", which is active.
    """

    built: LoadedModel
    bank: AdapterBank
    configs: Mapping[str, RunConfig]
    loaders: Mapping[str, DataLoaders]
    steps: Mapping[str, int]


def _setup_evaluation(
    configs: Mapping[str, RunConfig],
    run_dir: Path | None,
    runs: Mapping[str, Path | None],
    world: World,
) -> _EvaluationSetup:
    """Load the base and the newest state of each adapter.

    Args:
        configs: configuration to evaluate each adapter with, by name.
        run_dir: directory of the run, which may contain the solved base.
        runs: run directory of each adapter, by name.

    Raises:
        UserError: on every rank: unusable base, data or checkpoint.
    """
    config = next(iter(configs.values()))
    device = world.select_device(config.train.device)
    world.join_process_group(
        device, config.engine.timeout_minutes, config.engine.start_timeout_minutes
    )
    for each in configs.values():
        world.check_agreement("configuration", flatten_rank_config(each, world))
    setup_log(None, world.rank, world.size)
    with world.raise_together("prepare"):
        prepared = build_model(
            config if run_dir is None else use_solved_base_of_run(config, run_dir), world
        )
        saved = {
            name: _find_newest_checkpoint(run, world)
            for name, run in runs.items()
            if run is not None
        }
        positions = {name: c.read_position(path) for name, (c, path) in saved.items()}
        paths = [path for _, path in saved.values()]
        trained_on = read_checkpoint_bases(paths, prepared.skeleton.index)
    loaders = _make_adapter_loaders(configs, prepared, world, positions)
    for checkpoints, path in saved.values():
        load_init_factors(prepared, checkpoints, path)
        break  # all tasks of a run have the same initialization
    built = load_weights(prepared, prepared.config, world, device, trained_on)
    bank, steps = AdapterBank(built), {}
    if saved:
        built.setup_optimizer(make_optimizer_factory(config.train, device))
    for name, (checkpoints, path) in saved.items():
        position = checkpoints.read_position(path)
        own = replace_labels(built, list_class_names(configs[name].data))
        if position.base != own.base_id:
            labels = list_class_names(configs[name].data)
            raise UserError(
                f"checkpoint {path} was made on another base or another base.quant"
                + (f", or for other labels than {', '.join(labels)}" if labels else "")
                + f"; see base{' and data.train' if labels else ''} in {runs[name]}/config.yaml"
            )
        load_training_state(built, checkpoints, path, position.step)
        steps[name] = position.step
        if name:
            bank.store_active_adapter(name)
    return _EvaluationSetup(built, bank, configs, loaders, steps)


def _make_adapter_loaders(
    configs: Mapping[str, RunConfig],
    prepared: ModelSetup,
    world: World,
    positions: Mapping[str, RunPosition],
) -> dict[str, DataLoaders]:
    """Return the loaders of each adapter, with its training date in the chat template.

    Adapters with the same configuration share loaders.
    """
    made: dict[int, DataLoaders] = {}
    for name, config in configs.items():
        if id(config) not in made:
            found = positions.get(name)
            made[id(config)] = make_dated_loaders(config, prepared.tokenizer, world, found)
            world.check_agreement(
                "inputs", describe_rank_inputs(config, prepared, made[id(config)], None)
            )
            check_loaders_fit_model(
                made[id(config)], prepared.skeleton, prepared.adapter.num_extra_positions
            )
    return {name: made[id(config)] for name, config in configs.items()}


def _find_newest_checkpoint(run_dir: Path, world: World) -> tuple[CheckpointManager, Path]:
    """Return the checkpoints of a run and the path of the newest.

    Raises:
        UserError: the run has no complete checkpoint.
    """
    checkpoints = CheckpointManager(run_dir / "checkpoints", 1, world)
    path = checkpoints.select_checkpoint("auto")
    if path is None:
        raise UserError(f"{run_dir} has no complete checkpoint")
    return checkpoints, path
