"""``dist-peft eval``: held-out loss of a base, or of a run's newest checkpoint; multiple choice."""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_peft.app.build import Built, give_start, load, prepare, restore
from dist_peft.app.quantize import with_base_of_run
from dist_peft.app.rows import Loaders, check_fit, choice_loader, make_loaders
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.data.choices import read_questions
from dist_peft.train.checkpoint import Checkpoints
from dist_peft.train.choices import answer_questions
from dist_peft.train.evaluate import evaluate
from dist_peft.train.optim import make_optimizer_factory

__all__ = ["run"]

log = logging.getLogger("dist_peft")


def run(args: argparse.Namespace, world: World) -> int:
    """Print one JSON line: ``{"eval_loss": nats, "step": steps trained}``, with several held-out
    sources ``eval_by_task``, and for each file of ``--choices`` its accuracies."""
    config = load_config(args.config, args.overrides)
    if not config.data.eval:
        raise UserError("data.eval is empty: nothing to evaluate")
    built, loaders, step = _ready(config, args.run_dir, world)
    assert loaders.eval is not None
    held_out = evaluate(built.model, built.engine, loaders.eval, world)
    found: dict[str, Any] = {"eval_loss": held_out.loss, "step": step}
    if held_out.by_task:
        found["eval_by_task"] = held_out.by_task
    if args.choices:
        found["choices"] = {str(f): _choices(f, config, built, world) for f in args.choices}
    if world.is_first:
        print(json.dumps(found))
    return 0


def _choices(file: Path, config: RunConfig, built: Built, world: World) -> dict[str, Any]:
    with world.together("read questions"):
        questions = read_questions(file)
        extra = built.adapter.extra_positions
        loader = choice_loader(config, questions, built.skeleton, built.tokenizer, world, extra)
    return asdict(answer_questions(built.model, built.engine, questions, loader, world))


def _ready(config: RunConfig, run_dir: Path | None, world: World) -> tuple[Built, Loaders, int]:
    """The loaded model, its data, and how many steps it was trained."""
    device = world.device(config.train.device)
    world.connect(device, config.engine.timeout_minutes, config.engine.start_timeout_minutes)
    setup_log(None, world.rank, world.size)
    checkpoints = Checkpoints((run_dir or Path()) / "checkpoints", 1, world)
    with world.together("prepare"):
        prepared = prepare(config if run_dir is None else with_base_of_run(config, run_dir), world)
        config = prepared.config
        path = checkpoints.choose("auto") if run_dir is not None else None
        if run_dir is not None and path is None:
            raise UserError(f"{run_dir} has no complete checkpoint")
    loaders = make_loaders(config, prepared.tokenizer, world)
    check_fit(loaders, prepared.skeleton, prepared.adapter.extra_positions)
    step = 0
    if path is not None:
        give_start(prepared, checkpoints, path)
    built = load(prepared, config, world, device)
    if path is not None:
        position = checkpoints.position(path)
        if position.base != built.base_id:
            raise UserError(f"checkpoint {path} was made on another base or another base.quant")
        factory = make_optimizer_factory(config.train, device)
        built.optimize(factory)
        restore(built, checkpoints, path, position.step)
        step = position.step
    return built, loaders, step
