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
from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.exact_scope import describe_exact_scope
from dist_peft.app.model_setup import ModelSetup
from dist_peft.core.agreement import flatten_tree, hash_json_value
from dist_peft.core.config.run import FusionConfig, RunConfig
from dist_peft.core.redaction import redact_text
from dist_peft.core.world import World
from dist_peft.data.labels import list_class_names
from dist_peft.engine import resolve_engine_kind
from dist_peft.train.checkpoint import CheckpointManager

__all__ = [
    "count_total_steps",
    "describe_rank_inputs",
    "describe_run_values",
    "describe_versions",
    "flatten_rank_config",
]

_NODE_LOCAL = re.compile(
    r"base\.path|data\.(train|eval)\[\d+\]\.path|adapter\.adapters\[\d+\]\.path|data\.cache_dir"
    r"|data\.chat_template|engine\.deepspeed_config"
)
"""Keys that may differ between hosts: file contents are compared instead, except those of the token
cache, which are derived."""


def flatten_rank_config(config: RunConfig, world: World) -> dict[str, object]:
    """Return the configuration by key, which has to be equal on all ranks.

    Never raises: an unusable configuration has to be reported by all ranks together.
    """
    flat = flatten_tree(config.dump_stored_tree(with_digests=True))
    values = {k: v for k, v in flat.items() if not _NODE_LOCAL.fullmatch(k)}
    # checkpoints are written by all ranks into one directory
    values["save.dir"] = redact_text(str(Path(config.save.dir).expanduser().absolute()))
    values["tasks of data.train"] = [source.task_name for source in config.data.train]
    values["tasks of data.eval"] = [source.task_name for source in config.data.eval]
    if isinstance(config.adapter, FusionConfig):
        values["names of adapter.adapters"] = [
            adapter.display_name for adapter in config.adapter.adapters
        ]
    if config.engine.kind == "auto":
        values["engine.kind"] = f"auto: {'zero' if world.launcher == 'deepspeed' else 'fsdp2'}"
    if config.engine.deepspeed_config is not None:
        values["contents of engine.deepspeed_config"] = _read_json_contents(
            Path(config.engine.deepspeed_config)
        )
    return values


def _read_json_contents(path: Path) -> object:
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"unreadable: {error}"


def count_total_steps(config: RunConfig, loaders: DataLoaders) -> int:
    """Return the number of optimizer steps of the run, rounded up at the end of the last epoch."""
    c = config.train
    per_epoch = loaders.train.rows_per_epoch / c.global_batch
    # rounded: an average over variants of records is no whole number
    return c.steps or math.ceil(round(per_epoch * (c.epochs or 1.0), 9))


def describe_rank_inputs(
    config: RunConfig,
    setup: ModelSetup,
    loaders: DataLoaders,
    resume_from: Path | None,
    world: World,
) -> dict[str, object]:
    """Return fingerprints of this rank's inputs, the number of steps and the checkpoint."""
    scope = describe_exact_scope(config, world)
    return (
        _describe_inputs(config, setup, loaders)
        | scope
        | {
            "number of steps": count_total_steps(config, loaders),
            "checkpoint to resume": _describe_checkpoint(resume_from),
        }
    )


def _describe_checkpoint(path: Path | None) -> str:
    if path is None:
        return "none"
    position = CheckpointManager.read_position(path)
    return f"step {position.step} (SHA-256 {hash_json_value(vars(position))[:32]})"


def _describe_inputs(
    config: RunConfig, setup: ModelSetup, loaders: DataLoaders
) -> dict[str, object]:
    adapter: Adapter = setup.adapter
    return {
        "contents of base.path": setup.skeleton.index.compute_fingerprint(),
        "contents of adapter.adapters": adapter.input_fingerprint(),
        "labels of data.train": list(list_class_names(config.data)),
        **loaders.inputs,
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute a run, by key."""
    return {
        "version of dist_peft": importlib.metadata.version("dist_peft"),
        "version of torch": str(torch.__version__),
        "version of transformers": importlib.metadata.version("transformers"),
        "version of tokenizers": importlib.metadata.version("tokenizers"),
    }


def describe_run_values(
    config: RunConfig, setup: ModelSetup, loaders: DataLoaders, world: World
) -> dict[str, object]:
    """Return all values that a later resume compares, by key, as plain JSON.

    ``resume`` itself is excluded: it selects a checkpoint and does not describe the run; and
    ``sweep``, of which a point is a run like others.
    """
    values = flatten_tree(config.dump_stored_tree(with_digests=True))
    values.pop("resume", None)
    values.pop("sweep", None)
    values |= _describe_inputs(config, setup, loaders)
    values |= describe_exact_scope(config, world)
    values |= {
        "number of steps": count_total_steps(config, loaders),
        "number of ranks": world.size,
        "engine in use": resolve_engine_kind(config.engine, world),
        **describe_versions(),
    }
    plain: dict[str, object] = json.loads(json.dumps(values))
    return plain
