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

from dist_peft.app.base_content import hash_files, made_from
from dist_peft.app.gptq_solver import calibration_windows, solve
from dist_peft.app.model_setup import Built, load, prepare
from dist_peft.app.unused_options import warn_of_idle_options
from dist_peft.core.config.run import NoAdapterConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export.model_directory import MAX_FILE_BYTES, check_new, copy_configuration
from dist_peft.export.model_files import model_files
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import public_name, read_json_object, resolve_base
from dist_peft.model.prequantized.base import OWN_METHOD
from dist_peft.model.skeleton import torch_dtype
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter, TensorSpec

__all__ = ["must_solve_base", "quantize", "with_base_of_run", "with_solved_base"]

log = logging.getLogger("dist_peft")

_COPIED_BYTES = 64 * 2**20
"""Chunk size for copying tensors that stay unquantized."""


def quantize(
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
        world: after ``World.connect``.
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
    with world.together("read the base's configuration"):
        check_new(out)
        model_files(resolve_base(config.base), code=config.base.trust_remote_code)
        prepared = prepare(config, world, solving=True)
        if (found := prepared.skeleton.prequantized) is not None:
            raise UserError(
                f"base.path {config.base.path} is quantized already ({found.label}); give the "
                "unquantized base"
            )
        if any(isinstance(module, ExpertStack) for module in prepared.model.modules()):
            raise UserError(
                f"base.path {config.base.path} is a mixture of experts, which is not quantized in "
                "advance: gptq would need calibration tokens for each expert. Train on it with "
                "base.quant.kind nf4, or kind int with solver rtn or hqq, which quantize while it "
                "is loaded"
            )
    warn_of_idle_options(config, world, prepared.model, device.type)
    built = load(prepared, config, world, device)
    with _writer(built, out, world) as writer:  # first, so that a full disk fails early
        if quant.solver == "gptq":
            solve(built, calibration_windows(config, built, world), world, stop)
        _write(built, config, out, world, writer)
    log.info("wrote %s", out)


def with_solved_base(
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
    with world.together("look for a solved base"):
        directory = resolve_base(config.base)
        if "quantization_config" in read_json_object(directory / "config.json"):
            return config
        done = out.is_dir() and any(out.iterdir())
        if done:
            index = SafetensorsIndex.open(directory)
            found = made_from(out)
            if other := _other_origin(found, _origin(config, index.fingerprint()), index):
                raise _made_otherwise(out, other)
    if done:
        _check_origin_rows(out, found, index, world)
        log.info("the base was solved before: %s", out)
    else:
        quantize(config, out, world, device, stop)
        gc.collect()  # modules and hooks form reference cycles; free them before the next model
    return with_base_of_run(config, run_dir)


def must_solve_base(config: RunConfig, run_dir: Path) -> bool:
    """Return whether ``with_solved_base`` will quantize, which is slow and writes ``run_dir``."""
    quant, solved = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or (solved.is_dir() and any(solved.iterdir())):
        return False
    described = read_json_object(resolve_base(config.base) / "config.json")
    return "quantization_config" not in described


def with_base_of_run(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with the base that ``with_solved_base`` wrote, if there is one."""
    quant, solved = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or not solved.is_dir():
        return config
    base = config.base.model_copy(update={"path": str(solved), "revision": None})
    return config.model_copy(update={"base": base})


def _other_origin(
    found: Mapping[str, Any], wanted: Mapping[str, Any], index: SafetensorsIndex
) -> str | None:
    """Return which origin of a solved base has changed, without reading rows; None: none."""
    if not index.has_fingerprint(str(found.get("fingerprint"))):
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
    with world.together("look at the files of the unquantized base"):
        same_files = found.get("files") == _file_times(index)
    if known is None or not world.any(not same_files):
        return
    log.info("hashing %s, from which the solved base was made: its files are new", index.path)
    content = BaseRecord("", tensors=hash_files(index, index.tensors, world)).content_id
    if content != known:
        raise _made_otherwise(out, f"base.path: tensors of {index.path} hold other values")


def _made_otherwise(out: Path, other: str) -> UserError:
    return UserError(
        f"{out} was made from another {other}; remove {out.name}/ to quantize again, or choose "
        "another save.dir"
    )


def _file_times(index: SafetensorsIndex) -> list[list[str | int]]:
    """Return name, size and modification time (ns) of each file."""
    stats = [(file.name, file.stat()) for file in index.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _content_of(built: Built, world: World) -> dict[str, Any]:
    """Return the content hash of the unquantized base, reading tensors that the model skips."""
    index, tensors = built.skeleton.index, dict(built.record.tensors)
    tensors |= hash_files(index, index.tensors.keys() - tensors.keys(), world)
    content = BaseRecord("", tensors=tensors).content_id
    return {"content": content, "files": _file_times(index)}


def _origin(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """Return everything that the packed rows depend on; ``base`` is informative only."""
    quant = config.base.quant
    assert quant is not None
    origin: dict[str, Any] = {"base": public_name(config.base), "fingerprint": fingerprint}
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
def _writer(built: Built, out: Path, world: World) -> Iterator[StreamWriter | None]:
    """Yield the writer on rank 0, None on others; remove the partial directory on exit.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    partial, writer = _partial(out), None
    try:
        with world.together("start to write"):
            if world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                writer = StreamWriter(partial, _specs(built), MAX_FILE_BYTES)
        if writer is None:
            yield None
        else:
            with writer:
                yield writer
    finally:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)


def _write(
    built: Built, config: RunConfig, out: Path, world: World, writer: StreamWriter | None
) -> None:
    """Gather one linear at a time and write it from rank 0, then rename the directory to ``out``.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    linears, partial = _linears(built), _partial(out)
    content = _content_of(built, world)
    for source, linear in linears.items():
        packed = built.engine.gather(linear.packed)
        with world.together(f"write {source}"):
            if writer is not None:
                writer.write(_packed_name(source), packed)
    with world.together("write the rest"):
        if writer is not None:
            _copy_others(built, set(linears), writer)
            writer.close()
            _copy_configuration(built, config, partial, content)
            if out.is_dir():
                out.rmdir()  # empty, as was checked
            os.replace(partial, out)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _linears(built: Built) -> dict[str, FrozenLinear]:
    """Return the packed linears by the name of their weight in the base."""
    found = (module for module in built.model.modules() if isinstance(module, FrozenLinear))
    return {module.source: module for module in found if not module.is_head}


def _packed_name(source: str) -> str:
    return f"{source.removesuffix('.weight')}.packed"


def _specs(built: Built) -> list[TensorSpec]:
    specs, linears = [], _linears(built)
    for name, info in built.skeleton.index.tensors.items():
        if name in linears:
            shape = tuple(linears[name].packed.shape)
            specs.append(TensorSpec(_packed_name(name), torch.uint8, shape))
        else:
            specs.append(TensorSpec(name, info.dtype, info.shape))
    return specs


def _copy_others(built: Built, packed: set[str], writer: StreamWriter) -> None:
    with RowReader(built.skeleton.index) as reader:
        for name, info in built.skeleton.index.tensors.items():
            if name in packed:
                continue
            rows = max(1, _COPIED_BYTES // max(1, info.row_bytes))
            for span in Span(0, info.rows).chunks(rows):
                writer.write(name, reader.read(name, span), span.start)


def _copy_configuration(
    built: Built, config: RunConfig, out: Path, content: Mapping[str, Any]
) -> None:
    """Copy all files without weights; add the quantization to ``config.json``."""
    quant = config.base.quant
    assert quant is not None
    known = read_json_object(built.directory / "config.json")
    named = known.get("dtype") or known.get("torch_dtype")
    dtype = torch_dtype(named if isinstance(named, str) else config.base.compute_dtype)
    about = quant.model_dump(mode="json", include={"kind", "bits", "group_size", "solver"})
    if quant.kind == "nf4":
        about["double_quant"] = quant.double_quant
    origin = {**_origin(config, built.skeleton.index.fingerprint()), **content}
    settings = {"quant_method": OWN_METHOD, **about, "made_from": origin}
    changes = {"quantization_config": settings}
    code = config.base.trust_remote_code
    copy_configuration(built.directory, out, dtype, changes, code=code)
