"""``dist-peft eval``: held-out loss of a base, or of a run's newest checkpoint."""

import argparse
import json
import logging
from pathlib import Path

from dist_peft.app.build import give_start, load, prepare, restore
from dist_peft.app.rows import check_fit, make_loaders
from dist_peft.core.config import RunConfig
from dist_peft.core.config_io import load_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.train.checkpoint import Checkpoints
from dist_peft.train.evaluate import evaluate
from dist_peft.train.optim import make_optimizer_factory

__all__ = ["run"]

log = logging.getLogger("dist_peft")


def run(args: argparse.Namespace, world: World) -> int:
    """Print one JSON line: ``{"eval_loss": nats, "step": steps trained}``."""
    config = load_config(args.config, args.overrides)
    if not config.data.eval:
        raise UserError("data.eval is empty: nothing to evaluate")
    loss, step = _evaluate(config, args.run_dir, world)
    if world.is_first:
        print(json.dumps({"eval_loss": loss, "step": step}))
    return 0


def _evaluate(config: RunConfig, run_dir: Path | None, world: World) -> tuple[float, int]:
    device = world.device(config.train.device)
    world.connect(device, config.engine.timeout_minutes, config.engine.start_timeout_minutes)
    setup_log(None, world.rank, world.size)
    checkpoints = Checkpoints((run_dir or Path()) / "checkpoints", 1, world)
    with world.together("prepare"):
        prepared = prepare(config, world)
        path = checkpoints.choose("auto") if run_dir is not None else None
        if run_dir is not None and path is None:
            raise UserError(f"{run_dir} has no complete checkpoint")
    loaders = make_loaders(config, prepared.tokenizer, world)
    check_fit(loaders, prepared.skeleton)
    step = 0
    if path is not None:
        give_start(prepared, checkpoints, path)
    built = load(prepared, config, world, device)
    if path is not None:
        position = checkpoints.position(path)
        if position.base != built.base_id:
            raise UserError(f"checkpoint {path} was made on another base or another base.quant")
        factory = make_optimizer_factory(config.train, device)
        built.engine.optimize(built.model, factory, built.adapter.lr_scale)
        restore(built, checkpoints, path, position.step)
        step = position.step
    assert loaders.eval is not None
    loss = evaluate(built.model, built.engine, loaders.eval, world)
    return loss, step
