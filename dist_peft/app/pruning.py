"""Prune a base (``dist-peft prune``): an ordinary directory that any later run takes as its base.

``compress`` has the parts: the drivers, and the writer of the directory.
"""

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_peft.app.model_setup import ModelSetup, build_model, load_weights
from dist_peft.app.quantized_base import load_calibration_sequences
from dist_peft.app.rank_setup import download_base_once
from dist_peft.app.resolved_config import resolve_pruning
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.compress.block_influence import (
    count_dropped_blocks,
    measure_block_influence,
    select_kept_blocks,
)
from dist_peft.compress.calibration import CalibrationSize
from dist_peft.compress.prune_driver import (
    check_sparsity_fits,
    prune_by_calibration,
    prune_by_magnitude,
    store_in_file_dtypes,
)
from dist_peft.compress.pruned_base import (
    check_blocks_removable,
    open_pruned_writer,
    write_fewer_blocks,
    write_pruned_base,
)
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import describe_stored_otherwise
from dist_peft.model.hub import public_base_name
from dist_peft.model.model_files import list_model_files
from dist_peft.quant.sparsity import Sparsity
from dist_peft.store.publish import check_output_free

__all__ = ["PRUNING_METHODS", "PruningOptions", "prune_base"]

log = logging.getLogger("dist_peft")

PRUNING_METHODS = ("magnitude", "wanda", "sparsegpt", "blocks")


@dataclass(frozen=True)
class PruningOptions:
    """Options of ``dist-peft prune``.

    Attributes:
        method: one of ``PRUNING_METHODS``.
        sparsity: of each linear's weights; with ``blocks`` of the number of blocks.
        calibration: text from ``data.train``; magnitude needs none.
    """

    method: str
    sparsity: Sparsity
    calibration: CalibrationSize


def prune_base(
    config: RunConfig,
    options: PruningOptions,
    out: Path,
    world: World,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Prune ``config.base`` and write it to ``out``.

    Args:
        config: ``base.quant`` and the adapter section are ignored.
        out: a new directory, on a disk that rank 0 sees.
        world: after ``World.join_process_group``.
        stop: polled during calibration.

    Raises:
        StopRequested: ``stop`` returned true; the pruned blocks are kept next to the output.
        UserError: on every rank: an unusable base or data, options that do not fit it, ``out`` is
            not empty, no space.
    """
    if config.base.head == "classifier":
        raise UserError(
            "dist-peft prune is for language models, and base.head is classifier; prune the base "
            "with base.head: lm and text, and give its output as base.path"
        )
    with world.raise_together("look at the output's place"):
        check_output_free(out)
    download_base_once(config.base, world)
    with world.raise_together("read the base's configuration"):
        setup = _build_dense_model(config, options)
    warn_unused_options(setup.config, world, setup.model, device.type)
    engine = load_weights(setup, world, device).engine
    if options.method == "blocks":
        _drop_blocks(setup, engine, options, out, world, stop)
    else:
        _prune_weights(setup, engine, options, out, world, stop)
    log.info("wrote %s", out)


def _build_dense_model(config: RunConfig, options: PruningOptions) -> ModelSetup:
    """Build the model to prune and check that the options fit it.

    Raises:
        UserError: unusable files, a quantized base, a mixture of experts, or they do not fit.
    """
    resolved = resolve_pruning(config)
    list_model_files(resolved.directory, code=config.base.trust_remote_code)
    setup = build_model(resolved)
    if reason := describe_stored_otherwise(setup.model):
        raise UserError(f"base.path {config.base.path} is not pruned: {reason}")
    if any(isinstance(module, ExpertStack) for module in setup.model.modules()):
        raise UserError(
            f"base.path {config.base.path} is a mixture of experts, which is not pruned: each "
            "expert would need calibration tokens of its own"
        )
    if options.method == "blocks":
        count_dropped_blocks(options.sparsity, len(setup.skeleton.blocks))
        check_blocks_removable(setup.skeleton)
    else:
        check_sparsity_fits(setup.skeleton, options.sparsity)
        store_in_file_dtypes(setup.skeleton)
    return setup


def _prune_weights(
    setup: ModelSetup,
    engine: Engine,
    options: PruningOptions,
    out: Path,
    world: World,
    stop: Callable[[], bool],
) -> None:
    skeleton, sparsity, solved = setup.skeleton, options.sparsity, None
    with open_pruned_writer(skeleton, out, world) as writer:  # first: a full disk fails early
        sequences: Tensor | None = None
        if options.method == "magnitude":
            prune_by_magnitude(skeleton, engine, sparsity, world, stop)
        else:
            sequences = load_calibration_sequences(setup, world, options.calibration)
            inputs = _describe_inputs(setup, options, sequences, engine.device)
            solved = SolvedBlocks(out, inputs, world)
            prune_by_calibration(
                options.method, skeleton, engine, sparsity, sequences, world, stop, solved
            )
        pruning = _describe_pruning(setup, options, sequences)
        write_pruned_base(setup.config.base, skeleton, engine, pruning, world, writer)
    if solved is not None:
        solved.remove()


def _drop_blocks(
    setup: ModelSetup,
    engine: Engine,
    options: PruningOptions,
    out: Path,
    world: World,
    stop: Callable[[], bool],
) -> None:
    skeleton = setup.skeleton
    sequences = load_calibration_sequences(setup, world, options.calibration)
    influence = measure_block_influence(skeleton, engine, sequences, world, stop)
    kept = select_kept_blocks(influence, count_dropped_blocks(options.sparsity, len(influence)))
    dropped = sorted(set(range(len(influence))) - set(kept))
    log.info("dropping blocks %s of %d", ", ".join(map(str, dropped)), len(influence))
    pruning = {
        **_describe_pruning(setup, options, sequences),
        "dropped_blocks": dropped,
        "block_influence": [round(value, 6) for value in influence],
    }
    write_fewer_blocks(setup.config.base, skeleton, kept, pruning, out, world)


def _describe_pruning(
    setup: ModelSetup, options: PruningOptions, sequences: Tensor | None
) -> dict[str, Any]:
    """Return ``pruning`` of ``config.json``: how the directory was made."""
    pruning: dict[str, Any] = {
        "method": options.method,
        "sparsity": str(options.sparsity),
        "base": public_base_name(setup.config.base),
        "fingerprint": setup.skeleton.index.compute_fingerprint(),
    }
    if sequences is not None:
        samples, tokens = sequences.shape
        pruning["calibration"] = {"samples": samples, "tokens": tokens}
    return pruning


def _describe_inputs(
    setup: ModelSetup, options: PruningOptions, sequences: Tensor, device: torch.device
) -> Mapping[str, Any]:
    """Return everything that the pruned rows depend on."""
    base = setup.config.base
    return {
        "method": options.method,
        "sparsity": str(options.sparsity),
        "fingerprint": setup.skeleton.index.compute_fingerprint(),
        "compute_dtype": base.compute_dtype,
        "attention": base.attention,
        "sequences": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
        "device": device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
