"""Quantize a base in advance and write it packed (``dist-peft quantize``).

The output has the base's layout, with each linear weight of the blocks in packed rows::

    config.json         the base's, with quantization_config:
                        {"quant_method": "dist_peft", "kind": "int", "bits": 4, "group_size": 64,
                         "solver": "gptq", "made_from": {"base": ..., "fingerprint": ..., ...}}
    model*.safetensors  STEM.weight [out, in]  ->  STEM.packed uint8 [out, row_bytes]
                        everything else as in the base
    tokenizer, generation settings, licence: copies

It is renamed to its final name when it is complete. ``dist-peft train`` writes one to its run
directory where ``base.quant.solver`` is ``gptq`` and the base is not quantized yet.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dist_peft.app.base_content import hash_unread_tensors, read_quantization_origin
from dist_peft.app.gptq_solver import make_calibration_sequences, solve_gptq_codes
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.unused_options import warn_unused_options
from dist_peft.core.config.run import NoAdapterConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export.model_directory import MAX_FILE_BYTES, check_output_free, copy_model_files
from dist_peft.export.model_files import list_model_files
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import public_base_name, read_json_object, resolve_base_directory
from dist_peft.model.prequantized.base import OWN_METHOD
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter, TensorSpec

__all__ = ["ensure_solved_base", "must_solve_base", "quantize_base", "use_solved_base_of_run"]

log = logging.getLogger("dist_peft")

_COPIED_BYTES = 64 * 2**20
"""Chunk size for copying tensors that stay unquantized."""


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
        Stopped: ``stop`` returned true; nothing is written.
        UserError: on every rank: an unusable base or data, ``out`` is not empty, no space.
    """
    quant = config.base.quant
    if quant is None:
        raise UserError("base.quant is null: there is nothing to quantize; set base.quant.kind")
    if quant.solver == "gptq" and config.base.head == "classifier":
        raise UserError(
            "base.quant.solver gptq calibrates on documents, and data.train has records of format: "
            "classification; use solver hqq, or as base.path the output of dist-peft quantize for "
            "this base with base.head: lm and text"
        )
    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    config = config.model_copy(update={"adapter": NoAdapterConfig(), "engine": engine})
    with world.raise_together("read the base's configuration"):
        check_output_free(out)
        list_model_files(resolve_base_directory(config.base), code=config.base.trust_remote_code)
        prepared = build_model(config, world, solving=True)
        if (found := prepared.skeleton.prequantized) is not None:
            raise UserError(
                f"base.path {config.base.path} is quantized already ({found.format_label}); "
                "give the "
                "unquantized base"
            )
        if any(isinstance(module, ExpertStack) for module in prepared.model.modules()):
            raise UserError(
                f"base.path {config.base.path} is a mixture of experts, which is not quantized in "
                "advance: gptq would need calibration tokens for each expert. Train on it with "
                "base.quant.kind nf4, or kind int with solver rtn or hqq, which quantize while it "
                "is loaded"
            )
    warn_unused_options(config, world, prepared.model, device.type)
    built = load_weights(prepared, config, world, device)
    with _open_packed_writer(built, out, world) as writer:  # first, so that a full disk fails early
        if quant.solver == "gptq":
            solve_gptq_codes(built, make_calibration_sequences(config, built, world), world, stop)
        _write_packed_base(built, config, out, world, writer)
    log.info("wrote %s", out)


def ensure_solved_base(
    config: RunConfig, run_dir: Path, world: World, device: torch.device, stop: Callable[[], bool]
) -> RunConfig:
    """Return the configuration to train with, after running GPTQ if it is needed.

    Where ``base.quant.solver`` is gptq and the base is not quantized yet, it is quantized into
    ``run_dir/base``, once, and replaced by that.

    Raises:
        Stopped: ``stop`` returned true during calibration; nothing is written.
        UserError: on every rank: an unusable base or data, no space, or ``run_dir/base`` has
            another origin.
    """
    quant = config.base.quant
    if quant is None or quant.solver != "gptq":
        return config
    out = run_dir / "base"
    with world.raise_together("look for a solved base"):
        directory = resolve_base_directory(config.base)
        if "quantization_config" in read_json_object(directory / "config.json"):
            return config
        done = out.is_dir() and any(out.iterdir())
        if done:
            index = SafetensorsIndex.open(directory)
            found = read_quantization_origin(out)
            if other := _find_changed_origin(
                found, _describe_origin(config, index.compute_fingerprint()), index
            ):
                raise _make_origin_error(out, other)
    if done:
        _check_origin_rows(out, found, index, world)
        log.info("the base was solved before: %s", out)
    else:
        quantize_base(config, out, world, device, stop)
        gc.collect()  # modules and hooks form reference cycles; free them before the next model
    return use_solved_base_of_run(config, run_dir)


def must_solve_base(config: RunConfig, run_dir: Path) -> bool:
    """Return whether ``ensure_solved_base`` will quantize, which is slow and writes ``run_dir``."""
    quant, solved = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or (solved.is_dir() and any(solved.iterdir())):
        return False
    described = read_json_object(resolve_base_directory(config.base) / "config.json")
    return "quantization_config" not in described


def use_solved_base_of_run(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with the base that ``ensure_solved_base`` wrote, if there is one."""
    quant, solved = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or not solved.is_dir():
        return config
    base = config.base.model_copy(update={"path": str(solved), "revision": None})
    return config.model_copy(update={"base": base})


def _find_changed_origin(
    found: Mapping[str, Any], wanted: Mapping[str, Any], index: SafetensorsIndex
) -> str | None:
    """Return which origin of a solved base has changed, without reading rows; None: none."""
    if not index.matches_fingerprint(str(found.get("fingerprint"))):
        return f"base.path: {index.path} has changed, or is another base"
    mine, its = wanted.get("calibration", {}), found.get("calibration", {})
    keys = [key for key in mine if its.get(key) != mine[key]]
    return f"calibration ({', '.join(keys)} differ)" if keys else None


def _check_origin_rows(
    out: Path, found: Mapping[str, Any], index: SafetensorsIndex, world: World
) -> None:
    """Compare all rows of the unquantized base, which a run on the solved one does not read.

    Files with the recorded sizes and times are taken as unchanged.

    Raises:
        UserError: on every rank: ``out`` was quantized from other values.
    """
    known = found.get("content")
    with world.raise_together("look at the files of the unquantized base"):
        same_files = found.get("files") == _list_file_times(index)
    if known is None or not world.any_rank(not same_files):
        return
    log.info("hashing %s, from which the solved base was made: its files are new", index.path)
    content = BaseRecord("", tensors=hash_unread_tensors(index, index.tensors, world)).content_id
    if content != known:
        raise _make_origin_error(out, f"base.path: tensors of {index.path} hold other values")


def _make_origin_error(out: Path, other: str) -> UserError:
    return UserError(
        f"{out} was made from another {other}; remove {out.name}/ to quantize again, or choose "
        "another save.dir"
    )


def _list_file_times(index: SafetensorsIndex) -> list[list[str | int]]:
    """Return name, size and modification time (ns) of each file."""
    stats = [(file.name, file.stat()) for file in index.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _gather_base_content(built: LoadedModel, world: World) -> dict[str, Any]:
    """Return the content hash of the unquantized base, reading tensors that the model skips."""
    index, tensors = built.skeleton.index, dict(built.record.tensors)
    tensors |= hash_unread_tensors(index, index.tensors.keys() - tensors.keys(), world)
    content = BaseRecord("", tensors=tensors).content_id
    return {"content": content, "files": _list_file_times(index)}


def _describe_origin(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """Return everything that the packed rows depend on; ``base`` is informative only."""
    quant = config.base.quant
    assert quant is not None
    origin: dict[str, Any] = {"base": public_base_name(config.base), "fingerprint": fingerprint}
    if quant.solver == "gptq":
        data = config.data.model_dump(mode="json", include={"train", "seq_len", "loss_on"})
        text = json.dumps(data, sort_keys=True)
        origin["calibration"] = {
            "samples": quant.calibration_samples,
            "tokens": quant.calibration_tokens,
            "data": hashlib.sha256(text.encode()).hexdigest(),
            "seed": config.train.seed,
            "compute_dtype": config.base.compute_dtype,
        }
    return origin


@contextmanager
def _open_packed_writer(
    built: LoadedModel, out: Path, world: World
) -> Iterator[StreamWriter | None]:
    """Yield the writer on rank 0, None on others; remove the partial directory on exit.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    partial, writer = _get_partial_path(out), None
    try:
        with world.raise_together("start to write"):
            if world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                writer = StreamWriter(partial, _list_tensor_specs(built), MAX_FILE_BYTES)
        if writer is None:
            yield None
        else:
            with writer:
                yield writer
    finally:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)


def _write_packed_base(
    built: LoadedModel, config: RunConfig, out: Path, world: World, writer: StreamWriter | None
) -> None:
    """Gather one linear at a time and write it from rank 0, then rename the directory to ``out``.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    linears, partial = _map_packed_linears(built), _get_partial_path(out)
    content = _gather_base_content(built, world)
    for source, linear in linears.items():
        packed = built.engine.gather_parameter(linear.packed)
        with world.raise_together(f"write {source}"):
            if writer is not None:
                writer.write_rows(_make_packed_name(source), packed)
    with world.raise_together("write the rest"):
        if writer is not None:
            _copy_unpacked_tensors(built, set(linears), writer)
            writer.close()
            _copy_configuration(built, config, partial, content)
            if out.is_dir():
                out.rmdir()  # empty, as was checked
            os.replace(partial, out)


def _get_partial_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _map_packed_linears(built: LoadedModel) -> dict[str, FrozenLinear]:
    """Return the packed linears by the name of their weight in the base."""
    found = (module for module in built.model.modules() if isinstance(module, FrozenLinear))
    return {module.source: module for module in found if not module.is_head}


def _make_packed_name(source: str) -> str:
    return f"{source.removesuffix('.weight')}.packed"


def _list_tensor_specs(built: LoadedModel) -> list[TensorSpec]:
    specs, linears = [], _map_packed_linears(built)
    for name, info in built.skeleton.index.tensors.items():
        if name in linears:
            shape = tuple(linears[name].packed.shape)
            specs.append(TensorSpec(_make_packed_name(name), torch.uint8, shape))
        else:
            specs.append(TensorSpec(name, info.dtype, info.shape))
    return specs


def _copy_unpacked_tensors(built: LoadedModel, packed: set[str], writer: StreamWriter) -> None:
    with RowReader(built.skeleton.index) as reader:
        for name, info in built.skeleton.index.tensors.items():
            if name in packed:
                continue
            rows = max(1, _COPIED_BYTES // max(1, info.row_bytes))
            for span in Span(0, info.num_rows).split_into_chunks(rows):
                writer.write_rows(name, reader.read_rows(name, span), span.start)


def _copy_configuration(
    built: LoadedModel, config: RunConfig, out: Path, content: Mapping[str, Any]
) -> None:
    """Copy all files without weights; add the quantization to ``config.json``."""
    quant = config.base.quant
    assert quant is not None
    known = read_json_object(built.directory / "config.json")
    named = known.get("dtype") or known.get("torch_dtype")
    dtype = parse_torch_dtype(named if isinstance(named, str) else config.base.compute_dtype)
    about = quant.model_dump(mode="json", include={"kind", "bits", "group_size", "solver"})
    if quant.kind == "nf4":
        about["double_quant"] = quant.double_quant
    origin = {**_describe_origin(config, built.skeleton.index.compute_fingerprint()), **content}
    settings = {"quant_method": OWN_METHOD, **about, "made_from": origin}
    changes = {"quantization_config": settings}
    code = config.base.trust_remote_code
    copy_model_files(built.directory, out, dtype, changes, code=code)
