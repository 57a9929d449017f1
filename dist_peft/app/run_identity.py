"""Describe a run by key, for comparisons between ranks and with checkpoints.

Contents are compared, not paths: a base, data or an adapter may have another path on each host or
after a move, and has to consist of the same bytes. Three sets of values::

    rank_configuration   right after the rendezvous: the configuration without node-local paths
    rank_inputs          after data are read, before the base is: fingerprints, counts, steps
    run_values           contents of run.json of a checkpoint: the whole configuration and inputs
"""

import importlib.metadata
import json
import math
import re
from pathlib import Path

import torch

from dist_peft.adapters.protocol import Adapter
from dist_peft.app.data_setup import Loaders
from dist_peft.app.model_setup import Prepared
from dist_peft.core.agreement import digest_of, flatten_tree
from dist_peft.core.config.run import FusionConfig, RunConfig
from dist_peft.core.world import World
from dist_peft.data.labels import class_names
from dist_peft.engine import engine_kind
from dist_peft.train.checkpoint import Checkpoints

__all__ = ["rank_configuration", "rank_inputs", "run_values", "total_steps"]

_NODE_LOCAL = re.compile(
    r"base\.path|data\.(train|eval)\[\d+\]\.path|adapter\.adapters\[\d+\]\.path|data\.cache_dir"
    r"|engine\.deepspeed_config"
)
"""Keys that may differ between hosts: file contents are compared instead, except those of the token
cache, which are derived."""


def rank_configuration(config: RunConfig, world: World) -> dict[str, object]:
    """Return the resolved configuration by key, which has to be equal on all ranks.

    Never raises: an unusable configuration has to be reported by all ranks together.
    """
    flat = flatten_tree(config.model_dump(mode="json"))
    values = {k: v for k, v in flat.items() if not _NODE_LOCAL.fullmatch(k)}
    # checkpoints are written by all ranks into one directory
    values["save.dir"] = str(Path(config.save.dir).expanduser().absolute())
    values["tasks of data.train"] = [source.task for source in config.data.train]
    values["tasks of data.eval"] = [source.task for source in config.data.eval]
    if isinstance(config.adapter, FusionConfig):
        values["names of adapter.adapters"] = [adapter.label for adapter in config.adapter.adapters]
    if config.engine.kind == "auto":
        values["engine.kind"] = f"auto: {'zero' if world.launcher == 'deepspeed' else 'fsdp2'}"
    if config.engine.deepspeed_config is not None:
        values["contents of engine.deepspeed_config"] = _json_contents(
            Path(config.engine.deepspeed_config)
        )
    return values


def _json_contents(path: Path) -> object:
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"unreadable: {error}"


def total_steps(config: RunConfig, loaders: Loaders) -> int:
    """Return the number of optimizer steps of the run, rounded up at the end of the last epoch."""
    c = config.train
    per_epoch = len(loaders.train.rows) / c.global_batch
    return c.steps or math.ceil(per_epoch * (c.epochs or 1.0))


def rank_inputs(
    config: RunConfig, prepared: Prepared, loaders: Loaders, resume_from: Path | None
) -> dict[str, object]:
    """Return fingerprints of this rank's inputs, the number of steps and the checkpoint."""
    return _inputs(config, prepared, loaders) | {
        "number of steps": total_steps(config, loaders),
        "checkpoint to resume": _checkpoint(resume_from),
    }


def _checkpoint(path: Path | None) -> str:
    if path is None:
        return "none"
    position = Checkpoints.position(path)
    return f"step {position.step} (SHA-256 {digest_of(vars(position))[:32]})"


def _inputs(config: RunConfig, prepared: Prepared, loaders: Loaders) -> dict[str, object]:
    adapter: Adapter = prepared.adapter
    return {
        "contents of base.path": prepared.skeleton.index.fingerprint(),
        "contents of adapter.adapters": adapter.reads(),
        "labels of data.train": list(class_names(config.data)),
        **loaders.inputs,
    }


def run_values(
    config: RunConfig, prepared: Prepared, loaders: Loaders, world: World
) -> dict[str, object]:
    """Return all values that a later resume compares, by key, as plain JSON.

    ``resume`` itself is excluded: it selects a checkpoint and does not describe the run.
    """
    values = flatten_tree(config.model_dump(mode="json", exclude={"resume"}))
    values |= _inputs(config, prepared, loaders)
    values |= {
        "number of steps": total_steps(config, loaders),
        "number of ranks": world.size,
        "engine in use": engine_kind(config.engine, world),
        "version of dist_peft": importlib.metadata.version("dist_peft"),
        "version of torch": str(torch.__version__),
        "version of transformers": importlib.metadata.version("transformers"),
        "version of tokenizers": importlib.metadata.version("tokenizers"),
    }
    plain: dict[str, object] = json.loads(json.dumps(values))
    return plain
