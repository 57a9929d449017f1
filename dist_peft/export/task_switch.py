"""Write a merged directory again with another adapter in it, without its base.

``hf-bf16``
    every weight row by row, ``(W + D) - D + D'`` (``export.task_change``): a merge of the other
    run up to two roundings to the type of the weights. Where the base's zeros were kept they stay.

``mlx`` and ``hf-metal`` of a QA-LoRA run
    the adapter is in the biases alone (``adapters.low_rank.zero_points``), which give the base's
    zeros again::

        zero  =  round(-bias / scale + D / scale)         to an integer, or to float16 (HQQ)
        bias' =  -scale float32(zero - D' / scale)

    Two roundings to float32 lie between ``zero`` and ``bias``, together less than
    ``2^-23 |zero'|``, so the nearest possible zero is the right one; and each zero is merged with
    ``D`` again, which must give the stored bias bit for bit. So the result is, bit for bit, what an
    export of the other run gives, and the way back gives the first directory. Codes and scales are
    copied.

Memory: a chunk of rows a thread.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dist_peft.adapters.directory import keeps_zeros_of_base, open_adapter_merger
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.base_weights import list_base_weights
from dist_peft.export.formats.float_bias import HfMetalPacker, MlxPacker
from dist_peft.export.merge_record import RECORD_NAME, MergeRecord, hash_adapter
from dist_peft.export.merged_weights import CHUNK_BYTES, MergedWeights
from dist_peft.export.model_directory import copy_tokenizer_files, write_model_directory
from dist_peft.export.stopping import add_stop_tokens, remove_stop_tokens
from dist_peft.export.task_change import TaskChange, require_switchable_merger
from dist_peft.model.hub import read_json_object
from dist_peft.model.model_files import check_link_target, copy_file
from dist_peft.model.skeleton import build_skeleton, parse_torch_dtype
from dist_peft.quant.codec_defaults import AffineParts
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.publish import check_output_free, publish_directory
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import MAX_FILE_BYTES, StreamWriter, TensorSpec

__all__ = ["SwitchJob", "SwitchResult", "switch_merged_directory"]

_BIASES = {"mlx": MlxPacker.bias_name, "hf-metal": HfMetalPacker.bias_name}
"""Format -> the end of the names of its biases."""


@dataclass(frozen=True)
class SwitchJob:
    """Inputs of a switch.

    Attributes:
        merged: directory that ``merge`` or ``export`` wrote.
        out: new directory.
        removed: directory of the adapter that ``merged`` holds; None: it holds none.
        added: directory of the adapter to put in; None: none.
        base: configuration of the base, for the model's code and attention.
        overwrite: replace an export that is in ``out``.
    """

    merged: Path
    out: Path
    removed: Path | None
    added: Path | None
    base: BaseConfig
    overwrite: bool = False


@dataclass(frozen=True)
class SwitchResult:
    """What a switch did.

    Attributes:
        format: of the directory.
        changed: number of weights that hold another adapter now.
        rounding: error by rounding over the change by the adapter, of the weights (rms); 0: exact.
        exact: bit for bit what an export of the other run gives.
    """

    format: str
    changed: int
    rounding: float
    exact: bool


def switch_merged_directory(job: SwitchJob) -> SwitchResult:
    """Write ``job.out``: ``job.merged`` with the adapter ``added`` in the place of ``removed``.

    Raises:
        UserError: ``merged`` holds another adapter or was merged in a way that cannot be taken
            back, an adapter does not fit, ``out`` is not empty, the disk is full.
    """
    record = MergeRecord.read_from_directory(job.merged)
    _check_record(record, job)
    inputs = (job.merged, *(d for d in (job.removed, job.added) if d is not None))
    check_output_free(job.out, overwrite=job.overwrite, inputs=inputs)
    with publish_directory(job.out) as partial:
        if record.state == "codes":
            result = _switch_biases(job, record, partial)
        else:
            result = _switch_rows(job, record, partial)
        _copy_other_files(job.merged, partial)
        remove_stop_tokens(partial, record.stop_tokens)
        added = None if job.added is None else hash_adapter(job.added)
        stop_tokens: list[int] = []
        if job.added is not None:
            copy_tokenizer_files(job.added, partial)
            stop_tokens = add_stop_tokens(job.added, partial)
        made = replace(record, adapter=added, stop_tokens=tuple(stop_tokens))
        made.write_to_directory(partial)
    return result


def _check_record(record: MergeRecord, job: SwitchJob) -> None:
    """Compare the record with the job.

    Raises:
        UserError: see ``switch_merged_directory``.
    """
    packed = record.state == "codes"
    if record.format not in ({*_BIASES} if packed else {"hf-bf16"}):
        raise UserError(
            f"{job.merged} is a directory of format {record.format}, whose weights were rounded "
            "after the merge: the adapter cannot be taken out; export the other run instead. "
            "Merged directories (dist-peft merge) and mlx and hf-metal of QA-LoRA runs can switch"
        )
    _check_zeros(record, job)
    if record.adapter == "":
        raise UserError(
            f"{job.merged} holds trained weights of the base, which replaced the base's; merge the "
            "other run instead"
        )
    held = None if job.removed is None else hash_adapter(job.removed)
    if held != record.adapter:
        named = "none" if job.removed is None else str(job.removed)
        if record.adapter is None:
            raise UserError(f"{job.merged} holds no adapter; give --from none, not {named}")
        raise UserError(
            f"{job.merged} holds another adapter than --from {named} (by its {RECORD_NAME}); name "
            "the run that was merged, exported or switched to last"
        )


def _check_zeros(record: MergeRecord, job: SwitchJob) -> None:
    """Refuse runs that keep zeros which ``merged`` does not show.

    Raises:
        UserError: it was merged without them, or they are those of the quantized base.
    """
    masked = [d.parent for d in (job.removed, job.added) if d and keeps_zeros_of_base(d)]
    if masked and not record.keeps_zeros:
        raise UserError(
            f"{masked[0]} was trained with adapter.keep_zeros, and {job.merged} was merged without "
            "the base's zeros: which they are is not known any more; merge the run instead"
        )
    if masked and record.state == "original" and record.base.get("quant"):
        raise UserError(
            f"{masked[0]} was trained with adapter.keep_zeros on a quantized base, which has more "
            f"zeros than the original one that {job.merged} was merged into; merge the run instead"
        )


def _open_switchable(directory: Path | None, record: MergeRecord) -> Any:
    if directory is None:
        return None
    merger = require_switchable_merger(open_adapter_merger(directory), f"adapter {directory}")
    if record.state == "decoded" and getattr(merger, "starts_from_base", False):
        raise UserError(
            f"adapter {directory} began from the base's own factors (PiSSA, LoftQ), and the model "
            "was merged with --base decoded, so that the weights below the two adapters differ; "
            "merge the other run instead"
        )
    return merger


def _switch_rows(job: SwitchJob, record: MergeRecord, out: Path) -> SwitchResult:
    dtype = parse_torch_dtype(record.dtype)
    update = {"path": str(job.merged), "quant": None, "compute_dtype": record.dtype}
    skeleton = build_skeleton(job.base.model_copy(update=update), job.merged)
    linears = {weight.path for weight in list_base_weights(skeleton) if weight.linear is not None}
    change = TaskChange(
        _open_switchable(job.removed, record),
        _open_switchable(job.added, record),
        dtype,
        linears if record.keeps_zeros else (),
    )
    with ExitStack() as stack:
        reader = stack.enter_context(RowReader(skeleton.index))
        walk = MergedWeights(skeleton, change, reader, job.added or job.merged, "original")
        written = write_model_directory(walk, None, out, dtype)
    return SwitchResult(record.format, written.merged, change.rounding.share, exact=False)


# -- codes with float biases ---------------------------------------------------------------------


class _GroupMerger(Protocol):
    def changes_weight(self, weight: str) -> bool: ...

    def merge_affine_parts(self, weight: str, parts: AffineParts, span: Span) -> AffineParts: ...

    def unmerge_affine_parts(
        self, weight: str, parts: AffineParts, span: Span, *, integer: bool = True
    ) -> AffineParts: ...

    def list_unused_tensors(self) -> list[str]: ...


def _switch_biases(job: SwitchJob, record: MergeRecord, out: Path) -> SwitchResult:
    removed = cast(_GroupMerger | None, _open_switchable(job.removed, record))
    added = cast(_GroupMerger | None, _open_switchable(job.added, record))
    index = SafetensorsIndex.open(job.merged)
    bits = _read_bits(job.merged, record.format)
    specs = [TensorSpec(i.name, i.dtype, i.shape) for i in index.tensors.values()]
    end = f".{_BIASES[record.format]}"
    changed: set[str] = set()
    with RowReader(index) as reader, StreamWriter(out, specs, MAX_FILE_BYTES) as writer:
        for spec in specs:
            weight = f"{spec.name.removesuffix(end)}.weight"
            is_changed = spec.name.endswith(end) and any(
                merger is not None and merger.changes_weight(weight) for merger in (removed, added)
            )
            row_bytes = max(1, spec.row_bytes)
            for span in Span(0, spec.num_rows).split_into_chunks(max(1, CHUNK_BYTES // row_bytes)):
                rows = reader.read_rows(spec.name, span)
                if is_changed:
                    changed.add(weight)
                    scale = reader.read_rows(f"{spec.name.removesuffix(end)}.scales", span)
                    columns = index.find_tensor(weight).shape[1] * 32 // bits
                    rows = _switch_bias_rows(weight, rows, scale, columns, span, removed, added)
                writer.write_rows(spec.name, rows, span.start)
        for directory, merger in ((job.removed, removed), (job.added, added)):
            if merger is not None and (left := merger.list_unused_tensors()):
                raise UserError(
                    f"adapter {directory} adapts {left[0]}, which {job.merged} does not have "
                    "packed under this name: it belongs to another base"
                )
    return SwitchResult(record.format, len(changed), 0.0, exact=True)


def _switch_bias_rows(
    weight: str,
    bias: Tensor,
    scale: Tensor,
    columns: int,
    span: Span,
    removed: _GroupMerger | None,
    added: _GroupMerger | None,
) -> Tensor:
    """Return biases ``[n, groups]`` with the other adapter in them.

    Raises:
        UserError: the biases are not those of ``removed``.
    """
    codes = torch.empty(len(span), columns, dtype=torch.uint8, device="meta")  # its shape is read
    stored = AffineParts(codes, scale, -(bias.double() / scale.double()))
    found: AffineParts | None = None
    for integer in (True, False):
        base = _take_out(removed, weight, stored, span, integer=integer)
        # counted once: a merger knows each of its rows
        if base is not None and torch.equal(_put_in(removed, weight, base, span), bias):
            found = base
            break
    if found is None:
        raise UserError(
            f"{weight}: its biases are not those of the base's zeros with the adapter of --from; "
            "the directory was changed after the export, or is of another base"
        )
    return _put_in(added, weight, found, span)


def _take_out(
    merger: _GroupMerger | None, weight: str, parts: AffineParts, span: Span, *, integer: bool
) -> AffineParts | None:
    if merger is not None and merger.changes_weight(weight):
        try:
            return merger.unmerge_affine_parts(weight, parts, span, integer=integer)
        except ValueError:
            return None
    zero = parts.zero.round() if integer else parts.zero
    return parts._replace(zero=zero.half())


def _put_in(merger: _GroupMerger | None, weight: str, parts: AffineParts, span: Span) -> Tensor:
    """Return the biases of ``parts`` with an adapter, as the export writes them."""
    if merger is not None and merger.changes_weight(weight):
        parts = merger.merge_affine_parts(weight, parts, span)
    return -parts.scale.float() * parts.zero.float()


def _read_bits(merged: Path, format: str) -> int:
    config = read_json_object(merged / "config.json")
    key = "quantization" if format == "mlx" else "quantization_config"
    settings: Mapping[str, Any] = config.get(key) or {}
    bits = settings.get("bits") if isinstance(settings, dict) else None
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise UserError(f"{merged / 'config.json'} is damaged: {key}.bits is {bits!r}")
    return bits


def _copy_other_files(merged: Path, out: Path) -> None:
    """Copy the files that are neither weights nor the record; ``config.json`` last."""
    files = [p for p in merged.rglob("*") if p.is_file()]
    for path in sorted(files, key=lambda p: (p.name == "config.json", p)):
        name = path.relative_to(merged)
        is_weight = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if is_weight or path.name == RECORD_NAME or any(p.startswith(".") for p in name.parts):
            continue
        check_link_target(path, merged)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, out / name)
