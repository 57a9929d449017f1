"""Adapters on disk: read, write and check a directory of any method (``adapter_format``).

A directory holds the files that the method's ecosystem reads, PEFT's or AdapterHub's, and up to two
that only this project reads::

    adapter_config.json         the configuration
    adapter_model.safetensors   the tensors
    dist_peft.json              where the adapter comes from, ``tensors``: the names in both
                                safetensors files, and ``adapter``: facts for the merge
    dist_peft.safetensors       tensors that belong to these facts
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_peft.adapters.adapter_format import (
    ADAPTER_FORMATS,
    PEFT_TYPES,
    AdapterFormat,
    find_format,
)
from dist_peft.adapters.classifier_head.format import (
    SAFE_HEAD,
    join_peft_head,
    read_head,
    split_peft_head,
    write_adapterhub_head,
)
from dist_peft.adapters.fusion.format import is_fusion_config, list_fused_names
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.tensor_checks import check_tensor_names, check_tensor_values
from dist_peft.adapters.written_config import WRITTEN_CONFIG, refuse_edited_config
from dist_peft.core.errors import UserError
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.writer import write_atomically

__all__ = [
    "WEIGHT_KINDS",
    "check_public_adapter",
    "choose_tensors_file",
    "find_config_file",
    "read_adapter_directory",
    "read_adapter_metadata",
    "write_adapter_directory",
]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_METADATA = "dist_peft.json"
_EXTRA = "dist_peft.safetensors"
WEIGHT_KINDS = ("full", "partial")
"""``kind`` in the ``dist_peft.json`` of trained weights (``adapters.full.format``)."""


def check_public_adapter(public: PublicAdapter) -> None:
    """See that every tensor fits the configuration.

    Raises:
        UserError: one is empty, absent, of the wrong shape or type, of another method, or holds a
            value that is not finite.
    """
    check_tensor_values({**public.tensors, **public.extra}, "the adapter")
    if public.head is not None:
        check_tensor_values(public.head.tensors, "the adapter's head")
    known = find_format(public.config)
    if known is None:
        raise UserError(
            f"adapters of type {public.config.get('peft_type')} are not read; only "
            f"{', '.join(PEFT_TYPES)} and AdapterHub's bottlenecks and fusions are"
        )
    known.check(public)


# -- files -------------------------------------------------------------------------------------


def find_config_file(directory: Path) -> Path:
    """The configuration in an adapter's directory, which may be that of a fusion, or be absent."""
    names = dict.fromkeys(known.config_file for known in ADAPTER_FORMATS)
    present = [directory / name for name in names if (directory / name).is_file()]
    return present[0] if present else directory / _CONFIG


def choose_tensors_file(config: Mapping[str, Any]) -> str:
    """Return the name of the file with the tensors of a configuration with these contents."""
    known = find_format(config)
    return _TENSORS if known is None else known.tensors_file


def write_adapter_directory(
    directory: Path, public: PublicAdapter, metadata: Mapping[str, Any]
) -> None:
    """Write a directory that PEFT or AdapterHub's library loads.

    Each file is written whole or not at all.

    Args:
        directory: made if it does not exist.
        public: the adapter.
        metadata: further contents of ``dist_peft.json``; must be plain JSON.

    Raises:
        RuntimeError: a tensor is empty, has the wrong shape or lacks its partner.
        UserError: the disk is full or the directory cannot be written.
    """
    try:
        check_public_adapter(public)
    except UserError as error:
        raise RuntimeError(f"refusing to write a damaged adapter: {error}") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {directory}: {error.strerror}") from None
    about_parts = {key: value for key, value in metadata.items() if key != "labels"}
    for name, part in public.parts.items():
        write_adapter_directory(directory / name, part, about_parts)
    header = {"format": "pt"}
    if public.extra:
        write_atomically(directory / _EXTRA, safetensors.torch.save(public.extra, header))
    else:
        (directory / _EXTRA).unlink(missing_ok=True)
    config, tensors, known = public.config, public.tensors, find_format(public.config)
    assert known is not None  # check_public_adapter refuses others
    if known.joins_head:
        config, tensors = join_peft_head(public)
    else:
        write_adapterhub_head(directory, public)
    data = safetensors.torch.save(tensors, header)
    write_atomically(directory / known.tensors_file, data)
    facts = {
        **metadata,
        "tensors": sorted({*tensors, *public.extra}),
        "adapter": public.facts,
        WRITTEN_CONFIG: dict(config),
    }
    write_atomically(directory / _METADATA, json.dumps(facts, indent=2) + "\n")
    write_atomically(directory / known.config_file, json.dumps(config, indent=2) + "\n")


def read_adapter_directory(directory: Path, values: bool = True) -> PublicAdapter:
    """Read a directory, ours, PEFT's or AdapterHub's own, of a method that is trained here.

    Args:
        values: false for tensors on meta: names and shapes alone are read.

    Raises:
        UserError: no such adapter, another method, damaged, one that cannot be read safely, a
            configuration changed after it was written, or tensors of a wrong type or with values
            that are not finite.
    """
    config_file = find_config_file(directory)
    config = _read_json(config_file)
    if config is None:
        if (kind := read_adapter_metadata(directory).get("kind")) in WEIGHT_KINDS:
            raise UserError(
                f"{directory} holds weights of the base that adapter.kind {kind} trained. They are "
                "no adapter, and PEFT has no format for them; make a model of the run with "
                "dist-peft merge"
            )
        raise UserError(f"{directory} has no {_CONFIG}; give the directory of a PEFT adapter")
    known = find_format(config)
    if known is None:
        raise UserError(
            f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only "
            f"{', '.join(PEFT_TYPES)} are read"
        )
    file = directory / known.tensors_file
    if not file.is_file():
        raise _explain_absent_tensors(file, known)
    metadata = read_adapter_metadata(directory)
    refuse_edited_config(config_file, config, metadata)
    facts, labels = _parse_facts_and_labels(metadata, directory / _METADATA)
    extra = (
        _read_adapter_tensors(directory / _EXTRA, values) if (directory / _EXTRA).is_file() else {}
    )
    tensors = _read_adapter_tensors(file, values)
    check_tensor_names(metadata.get("tensors"), {*tensors, *extra}, directory)
    config, tensors, head = split_peft_head(config, tensors, labels)
    if not known.joins_head and (labels or (directory / SAFE_HEAD).is_file()):
        if not (directory / SAFE_HEAD).is_file():
            raise UserError(
                f"{directory} has no {SAFE_HEAD}, the head of the classes that its {_METADATA} "
                "names; is the download complete?"
            )
        head = read_head(_read_adapter_tensors(directory / SAFE_HEAD, values), labels)
    parts = {}
    if is_fusion_config(config):
        own = {name: directory / name for name in list_fused_names(config)}
        parts = {name: read_adapter_directory(d, values) for name, d in own.items() if d.is_dir()}
    return PublicAdapter(config, tensors, facts, extra, head, parts)


def _parse_facts_and_labels(
    metadata: Mapping[str, Any], file: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``adapter`` and ``labels`` of ``dist_peft.json``.

    Raises:
        UserError: they are of another type, or the start is none that is known.
    """
    facts, labels = metadata.get("adapter", {}), metadata.get("labels", [])
    again = "get the adapter again"
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged: adapter must hold a JSON object; {again}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{file} is damaged: labels must be a list of names; {again}")
    start = facts.get("start", "default")
    if start not in ("default", "pissa", "loftq"):
        raise UserError(
            f"{file} is damaged: adapter.start is {start!r}, which no adapter has; {again}"
        )
    init = metadata.get("start", start)  # adapter.init of the run
    if init != start and {init, start} & {"pissa", "loftq"}:
        raise UserError(
            f"{file} is damaged: adapter.start is {start!r}, but start is {init!r}; {again}"
        )
    return facts, tuple(labels)


def _explain_absent_tensors(file: Path, known: AdapterFormat) -> UserError:
    """``file`` is absent; maybe a pickle is there instead."""
    pickle = known.pickle_file
    if (file.parent / pickle).is_file():
        return UserError(
            f"{file.parent} has {pickle}, a pickle, which can run code when it is opened; save the "
            f"adapter as {file.name} ({known.safe_saving})"
        )
    return UserError(f"{file.parent} has no {file.name}; is the download complete?")


def read_adapter_metadata(directory: Path) -> dict[str, Any]:
    """Contents of ``dist_peft.json``; empty for an adapter that PEFT wrote.

    Raises:
        UserError: the file is damaged.
    """
    return _read_json(directory / _METADATA) or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return content


def _read_adapter_tensors(path: Path, values: bool) -> dict[str, Tensor]:
    if not values:
        infos = SafetensorsIndex.open(path).tensors
        tensors = {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in infos.items()}
    else:
        try:
            tensors = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}; get it again") from None
    check_tensor_values(tensors, path)
    return tensors
