"""Evaluate a base, or the adapters of a run, on held-out data and multiple-choice questions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_peft.app.adapter_bank import AdapterBank
from dist_peft.app.base_content import read_checkpoint_bases
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model, make_choice_loader
from dist_peft.app.document_isolation import check_document_isolation, count_packed_tokens
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    load_init_factors,
    load_training_state,
    load_weights,
    replace_labels,
)
from dist_peft.app.rank_setup import download_base_once, join_ranks
from dist_peft.app.resolved_config import ResolvedConfig, find_solved_base, resolve_config
from dist_peft.app.resuming import check_trained_tokenizer, make_dated_loaders
from dist_peft.app.run_identity import describe_rank_inputs
from dist_peft.app.tasks import list_task_runs, refuse_sweep
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

__all__ = ["evaluate_run"]


def evaluate_run(
    config: RunConfig,
    run_dir: Path | None,
    choices: Sequence[Path],
    world: World,
    checkpoint: str = "last",
) -> dict[str, Any]:
    """Load the base once, evaluate each adapter and return the JSON fields of ``dist-peft eval``.

    Args:
        config: as the user gave it.
        run_dir: evaluate this run; None: the base.
        choices: files of multiple-choice questions.
        checkpoint: which of the run: ``last``, ``best`` or a step.

    Raises:
        UserError: on every rank: unusable base, data or checkpoint.
    """
    if run_dir is not None:
        with world.raise_together("look for points of a sweep"):
            refuse_sweep(run_dir)
    runs = {} if run_dir is None else list_task_runs(run_dir)
    if not runs:
        only = {} if run_dir is None else {"": run_dir}
        return _evaluate_adapter(
            _setup_evaluation(config, run_dir, only, checkpoint, world), "", choices, world
        )
    ready = _setup_evaluation(config, run_dir, runs, checkpoint, world)
    adapters: dict[str, dict[str, Any]] = {}
    own: dict[str, float] = {}
    for name in runs:
        ready.bank.activate_adapter(name)
        adapters[name] = _evaluate_adapter(ready, name, choices, world)
        if (loss := _select_task_loss(ready.configs[name], name, adapters[name])) is not None:
            own[name] = loss
    return {"adapters": adapters, "own": own}


def _select_task_configs(
    resolved: ResolvedConfig, runs: Mapping[str, Path]
) -> dict[str, ResolvedConfig]:
    """Return the configuration to evaluate each adapter with.

    It has all held-out sources; for a classifier of separate tasks, which has the labels of its
    task only, those of its task.
    """
    names = list(runs) or [""]
    if names == [""] or not resolved.run.data.is_classification:
        return dict.fromkeys(names, resolved)
    tasks = resolved.split_tasks()
    if unknown := set(runs) - set(tasks):
        raise UserError(f"data.train of --config has no task {sorted(unknown)[0]}, the run has")
    return {name: tasks[name] for name in names}


def _evaluate_adapter(
    ready: "_EvaluationSetup", name: str, choices: Sequence[Path], world: World
) -> dict[str, Any]:
    """Evaluate the active adapter, called ``name``, and return its JSON fields."""
    built, loaders = ready.built, ready.loaders[name]
    found: dict[str, Any] = {}
    if loaders.eval is not None:
        found |= evaluate_model(
            built.model, built.engine, loaders.objective, loaders.eval, world
        ).to_metric_fields()
    found["step"] = ready.steps.get(name, 0)
    if choices:
        config = ready.configs[name]
        found["choices"] = {str(f): _evaluate_choices(f, config, built, world) for f in choices}
    return found


def _select_task_loss(config: RunConfig, name: str, found: dict[str, Any]) -> float | None:
    """Return the loss on the held-out source of task ``name``, if there is one."""
    loss: float | None = found.get("eval_by_task", {}).get(name)
    if [source.task_name for source in config.data.held_out] == [name]:
        loss = found["eval_loss"]
    return loss


def _evaluate_choices(
    file: Path, config: RunConfig, built: LoadedModel, world: World
) -> dict[str, Any]:
    with world.raise_together("read questions"):
        questions = read_choice_questions(file)
        extra = built.setup.adapter.num_extra_positions
        loader = make_choice_loader(
            config, questions, built.setup.skeleton, built.setup.tokenizer, world, extra
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
    config: RunConfig,
    run_dir: Path | None,
    runs: Mapping[str, Path],
    checkpoint: str,
    world: World,
) -> _EvaluationSetup:
    """Load the base and one checkpoint of each adapter.

    Args:
        config: as the user gave it.
        run_dir: directory of the run, which may contain the solved base.
        runs: run directory of each adapter, by name.
        checkpoint: ``last``, ``best`` or a step.

    Raises:
        UserError: on every rank: unusable base, data or checkpoint.
    """
    device = join_ranks(config, world)
    setup_log(None, world.rank, world.size)
    solved = None if run_dir is None else find_solved_base(config, run_dir)
    download_base_once(config.base, world)
    with world.raise_together("prepare"):
        resolved = resolve_config(config, solved)
        configs = _select_task_configs(resolved, runs)
        packed_tokens = count_packed_tokens(config)
        setup = build_model(next(iter(configs.values())), packed_tokens=packed_tokens)
    saved = {name: _find_checkpoint(run, checkpoint, world) for name, run in runs.items()}
    with world.raise_together("compare the base with that of the checkpoint"):
        positions = {name: c.read_position(path) for name, (c, path) in saved.items()}
        paths = [path for _, path in saved.values()]
        trained_on = read_checkpoint_bases(paths, setup.skeleton.index, setup.config.base.quant)
    run_configs = {name: each.run for name, each in configs.items()}
    loaders = _make_adapter_loaders(run_configs, setup, world, positions)
    for checkpoints, path in saved.values():
        load_init_factors(setup, checkpoints, path)
        break  # all tasks of a run have the same initialization
    built = load_weights(setup, world, device, trained_on)
    bank, steps = AdapterBank(built), {}
    if saved:
        built.setup_optimizer(make_optimizer_factory(config.train, device))
    for name, (checkpoints, path) in saved.items():
        position = checkpoints.read_position(path)
        labels = list_class_names(run_configs[name].data)
        own = replace_labels(built, labels)
        if position.base != own.setup.base_id:
            raise UserError(
                f"checkpoint {path} was made on another base or another base.quant"
                + (f", or for other labels than {', '.join(labels)}" if labels else "")
                + f"; see base{' and data.train' if labels else ''} in {runs[name]}/config.yaml"
            )
        load_training_state(built, checkpoints, path, position.step)
        steps[name] = position.step
        if name:
            bank.store_active_adapter(name)
    check_document_isolation(built, config)
    return _EvaluationSetup(built, bank, run_configs, loaders, steps)


def _make_adapter_loaders(
    configs: Mapping[str, RunConfig],
    setup: ModelSetup,
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
            made[id(config)] = make_dated_loaders(config, setup.tokenizer, world, found)
            if found is not None:
                check_trained_tokenizer(found, made[id(config)].inputs)
            world.check_agreement(
                "inputs", describe_rank_inputs(config, setup, made[id(config)], None, world)
            )
            check_loaders_fit_model(
                made[id(config)], setup.skeleton, setup.adapter.num_extra_positions
            )
    return {name: made[id(each)] for name, each in configs.items()}


def _find_checkpoint(run_dir: Path, which: str, world: World) -> tuple[CheckpointManager, Path]:
    """Return the checkpoints of a run and the path of one of them.

    Args:
        which: ``last``, ``best`` or a step.

    Raises:
        UserError: on every rank: there is no such checkpoint, or it is damaged.
    """
    checkpoints = CheckpointManager(run_dir / "checkpoints", 1, world)
    return checkpoints, checkpoints.find_checkpoint(which)
