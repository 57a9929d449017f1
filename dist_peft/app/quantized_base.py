"""Quantize a base in advance (``dist-peft quantize``), and once for a run with solver gptq.

``compress`` has the parts: the GPTQ driver, and the writers of the packed directory and of the base
with GPTQ's factors. ``dist-peft train`` writes one to its run directory where ``base.quant.solver``
is ``gptq`` and the base is not quantized yet: factors where ``adapter.through_quantizer`` encodes
rows again in each step, else packed rows.
"""

import gc
import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_peft.app.data_setup import check_token_range, load_source_rows
from dist_peft.app.model_setup import ModelSetup, build_model, load_weights
from dist_peft.app.rank_setup import download_base_once
from dist_peft.app.resolved_config import SolvedBase, find_solved_base, resolve_quantization
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.compress.base_origin import (
    check_origin_contents,
    check_origin_settings,
    describe_origin,
    gather_base_content,
)
from dist_peft.compress.calibrated_base import (
    FactorWriter,
    open_calibrated_writer,
    write_calibrated_base,
)
from dist_peft.compress.calibration import CalibrationSize, make_calibration_sequences
from dist_peft.compress.gptq_driver import solve_gptq_codes
from dist_peft.compress.packed_base import open_packed_writer, write_packed_base
from dist_peft.compress.solved_blocks import SolvedBlocks
from dist_peft.core.config.run import LoraConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import describe_stored_otherwise
from dist_peft.model.gptq_factors import has_gptq_factors
from dist_peft.model.hub import read_json_object, resolve_base_directory
from dist_peft.model.model_files import list_model_files
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.publish import check_output_free

__all__ = [
    "calibrate_base",
    "ensure_solved_base",
    "load_calibration_sequences",
    "must_solve_base",
    "quantize_base",
]

log = logging.getLogger("dist_peft")


def quantize_base(
    config: RunConfig,
    out: Path,
    world: World,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Quantize ``config.base`` according to ``config.base.quant`` and write it to ``out``.

    Args:
        config: the adapter section is ignored; ``data.train`` is used by gptq.
        out: a new directory, on a disk that rank 0 sees.
        world: after ``World.join_process_group``.
        stop: polled during calibration.

    Raises:
        StopRequested: ``stop`` returned true; the solved blocks are kept next to the output.
        UserError: on every rank: an unusable base or data, ``out`` is not empty, no space.
    """
    quant = config.base.quant
    if quant is None:
        raise UserError("base.quant is null: there is nothing to quantize; set base.quant.kind")
    if quant.embeddings:
        raise UserError(
            "base.quant.embeddings is for training, which packs the embedding and the head while "
            "it loads them; a written base keeps them unquantized: set it to false"
        )
    if quant.solver == "gptq" and config.base.head == "classifier":
        raise UserError(
            "base.quant.solver gptq calibrates on documents, and data.train has records of format: "
            "classification; use solver hqq, or as base.path the output of dist-peft quantize for "
            "this base with base.head: lm and text"
        )
    with world.raise_together("look at the output's place"):
        check_output_free(out)
    download_base_once(config.base, world)
    with world.raise_together("read the base's configuration"):
        setup = _build_unquantized_model(config)
    warn_unused_options(setup.config, world, setup.model, device.type)
    built = load_weights(setup, world, device)
    skeleton, engine = setup.skeleton, built.engine
    origin = describe_origin(setup.config, skeleton.index.compute_fingerprint())
    solved = None
    with open_packed_writer(skeleton, out, world) as writer:  # first: a full disk fails early
        if quant.solver == "gptq":
            sequences = load_calibration_sequences(setup, world)
            solved = SolvedBlocks(out, _describe_solve(setup, origin, sequences, device), world)
            solve_gptq_codes(skeleton, engine, sequences, world, stop, solved)
        origin |= gather_base_content(skeleton.index, built.record.tensors, world)
        write_packed_base(setup.config.base, skeleton, engine, origin, world, writer)
    if solved is not None:
        solved.remove()
    log.info("wrote %s", out)


def calibrate_base(
    config: RunConfig,
    out: Path,
    world: World,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write ``config.base`` with the factors by which GPTQ encodes its rows, to ``out``.

    The factors are those of ``quantize_base``: of each block's inputs once the blocks before are
    quantized. A calibration that is stopped begins again.

    Args:
        config: ``base.quant.solver`` is gptq.
        out, world, device, stop: as in ``quantize_base``.

    Raises:
        StopRequested: ``stop`` returned true; nothing is left.
        UserError: on every rank: see ``quantize_base``.
    """
    with world.raise_together("look at the output's place"):
        check_output_free(out)
    download_base_once(config.base, world)
    with world.raise_together("read the base's configuration"):
        setup = _build_unquantized_model(config)
    built = load_weights(setup, world, device)
    skeleton = setup.skeleton
    origin = describe_origin(setup.config, skeleton.index.compute_fingerprint())
    with open_calibrated_writer(skeleton, out, world) as writer:
        factors = None if writer is None else FactorWriter(writer.directory)
        sequences = load_calibration_sequences(setup, world)
        keep = None if factors is None else factors.write_factor
        solve_gptq_codes(skeleton, built.engine, sequences, world, stop, keep=keep)
        origin |= gather_base_content(skeleton.index, built.record.tensors, world)
        write_calibrated_base(setup.config.base, skeleton, origin, world, writer, factors)
    log.info("wrote %s", out)


def _describe_solve(
    setup: ModelSetup, origin: Mapping[str, Any], sequences: Tensor, device: torch.device
) -> dict[str, Any]:
    """Return everything that the rows which GPTQ solves depend on."""
    quant = setup.config.base.quant
    assert quant is not None
    return {
        "origin": {key: value for key, value in origin.items() if key != "base"},
        "quant": quant.model_dump(mode="json"),
        "sequences": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),
        "attention": setup.config.base.attention,
        "device": device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def _build_unquantized_model(config: RunConfig) -> ModelSetup:
    """Build the model to quantize.

    Raises:
        UserError: unusable files, a quantized base, or a mixture of experts.
    """
    resolved = resolve_quantization(config)
    list_model_files(resolved.directory, code=config.base.trust_remote_code)
    setup = build_model(resolved)
    if (found := setup.skeleton.prequantized) is not None:
        raise UserError(
            f"base.path {config.base.path} is quantized already ({found.format_label}); give the "
            "unquantized base"
        )
    if reason := describe_stored_otherwise(setup.model):
        raise UserError(
            f"base.path {config.base.path} is not quantized in advance: {reason}; train on it with "
            "base.quant.kind nf4, or kind int with solver rtn or hqq, which quantize while it is "
            "loaded"
        )
    if any(isinstance(module, ExpertStack) for module in setup.model.modules()):
        raise UserError(
            f"base.path {config.base.path} is a mixture of experts, which is not quantized in "
            "advance: gptq would need calibration tokens for each expert. Train on it with "
            "base.quant.kind nf4, or kind int with solver rtn or hqq, which quantize while it "
            "is loaded"
        )
    return setup


def load_calibration_sequences(
    setup: ModelSetup, world: World, size: CalibrationSize | None = None
) -> Tensor:
    """Return token sequences of ``data.train``: long ``[samples, tokens]``, equal on every rank.

    Args:
        setup: of ``resolve_quantization`` or ``resolve_pruning``.
        size: None: that of ``base.quant``.

    Raises:
        UserError: on every rank: unreadable data, or less than one sequence of text.
    """
    data, quant = setup.config.data, setup.config.base.quant
    if size is None:
        assert quant is not None
        size = CalibrationSize(quant.calibration_samples, quant.calibration_tokens)
    assert not data.packing
    plain = [source.without_variants() for source in data.train]
    documents = load_source_rows(data, plain, "train", setup.tokenizer, world)
    check_token_range("data.train", documents, setup.skeleton)
    base = setup.skeleton.index.compute_fingerprint()
    inputs = {"contents of base.path": base, "contents of data.train": documents.fingerprint}
    world.check_agreement("calibration data", inputs)
    return make_calibration_sequences(
        documents,
        size,
        max_positions=setup.skeleton.max_positions,
        seed=setup.config.train.seed,
    )


def ensure_solved_base(
    config: RunConfig, run_dir: Path, world: World, device: torch.device, stop: Callable[[], bool]
) -> SolvedBase | None:
    """Return the base that GPTQ has quantized for this run, after quantizing it if it is needed.

    It is needed where ``base.quant.solver`` is gptq and the base is not quantized yet, and written
    to ``run_dir/base``, once; with ``adapter.through_quantizer`` the base with its factors
    (``model.gptq_factors``).

    Raises:
        StopRequested: ``stop`` returned true; the solved blocks are kept next to the output.
        UserError: on every rank: an unusable base or data, no space, or ``run_dir/base`` has
            another origin.
    """
    quant = config.base.quant
    if quant is None or quant.solver != "gptq":
        return None
    out = run_dir / "base"
    with world.raise_together("look for a solved base"):
        directory = resolve_base_directory(config.base)
        if _is_solved(directory):
            return None
        done = out.is_dir() and any(out.iterdir())
        if done:
            index = SafetensorsIndex.open(directory)
            check_origin_settings(out, config, index)
            if has_gptq_factors(out) != _encodes_again(config):
                raise UserError(
                    f"{out} was made {'with' if has_gptq_factors(out) else 'without'} "
                    "adapter.through_quantizer; remove it, or choose another save.dir"
                )
    if done:
        check_origin_contents(out, index, world)
        log.info("the base was solved before: %s", out)
    else:
        write = calibrate_base if _encodes_again(config) else quantize_base
        write(config, out, world, device, stop)
        gc.collect()  # modules and hooks form reference cycles; free them before the next model
    return find_solved_base(config, run_dir)


def must_solve_base(config: RunConfig, run_dir: Path) -> bool:
    """Return whether ``ensure_solved_base`` will quantize, which is slow and writes ``run_dir``."""
    quant, solved = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or (solved.is_dir() and any(solved.iterdir())):
        return False
    return not _is_solved(resolve_base_directory(config.base))


def _is_solved(directory: Path) -> bool:
    packed = "quantization_config" in read_json_object(directory / "config.json")
    return packed or has_gptq_factors(directory)


def _encodes_again(config: RunConfig) -> bool:
    return isinstance(config.adapter, LoraConfig) and config.adapter.through_quantizer
