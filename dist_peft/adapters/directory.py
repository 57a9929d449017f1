"""Adapters on disk: read, write, check and open for a merge a directory of any method.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_peft.adapters.adapter_format import (
    ADAPTER_FORMATS,
    PEFT_TYPES,
    find_format,
)
from dist_peft.adapters.classifier_head.format import (
    SAFE_HEAD,
    join_peft_head,
    read_head,
    split_peft_head,
    write_adapterhub_head,
)
from dist_peft.adapters.classifier_head.merge import HeadMerger
from dist_peft.adapters.full.format import TrainedWeightsMerger, contains_trained_weights
from dist_peft.adapters.fusion.format import is_fusion_config, list_fused_names
from dist_peft.adapters.lora.tensors import MASKED_TYPE
from dist_peft.adapters.metadata import (
    METADATA_FILE,
    WEIGHT_KINDS,
    WRITTEN_CONFIG,
    parse_facts_and_labels,
    read_adapter_metadata,
    read_optional_json,
    refuse_edited_config,
)
from dist_peft.adapters.protocol import AdapterFormat, PublicAdapter, WeightMerger
from dist_peft.adapters.tensor_checks import check_tensor_names, check_tensor_values
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.writer import write_atomically

__all__ = [
    "PEFT_VERSION",
    "check_public_adapter",
    "choose_tensors_file",
    "find_config_file",
    "keeps_zeros_of_base",
    "open_adapter_merger",
    "open_merger",
    "read_adapter_directory",
    "write_adapter_directory",
]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_EXTRA = "dist_peft.safetensors"

PEFT_VERSION = "0.21.2"
"""Version of PEFT whose format is written, and which the tests load it with."""


def check_public_adapter(public: PublicAdapter) -> None:
    """Check that every tensor fits the configuration.

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


def keeps_zeros_of_base(directory: Path) -> bool:
    """Return whether an adapter's change is cut off where the base, as training saw it, is zero
    (``adapter.keep_zeros``)."""
    config = read_optional_json(find_config_file(directory)) or {}
    return config.get("peft_type") == MASKED_TYPE


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
    if "peft_type" in config:
        config = {**config, "peft_version": PEFT_VERSION}
    data = safetensors.torch.save(tensors, header)
    write_atomically(directory / known.tensors_file, data)
    facts = {
        **metadata,
        "tensors": sorted({*tensors, *public.extra}),
        "adapter": public.facts,
        WRITTEN_CONFIG: dict(config),
    }
    write_atomically(directory / METADATA_FILE, json.dumps(facts, indent=2) + "\n")
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
    refuse_special_files(directory)
    config_file = find_config_file(directory)
    config = read_optional_json(config_file)
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
    facts, labels = parse_facts_and_labels(metadata, directory / METADATA_FILE)
    extra = (
        _read_adapter_tensors(directory / _EXTRA, values) if (directory / _EXTRA).is_file() else {}
    )
    tensors = _read_adapter_tensors(file, values)
    check_tensor_names(metadata.get("tensors"), {*tensors, *extra}, directory)
    config, tensors, head = split_peft_head(config, tensors, labels)
    if not known.joins_head and (labels or (directory / SAFE_HEAD).is_file()):
        if not (directory / SAFE_HEAD).is_file():
            raise UserError(
                f"{directory} has no {SAFE_HEAD}, the head of the classes that its {METADATA_FILE} "
                "names; is the download complete?"
            )
        head = read_head(_read_adapter_tensors(directory / SAFE_HEAD, values), labels)
    parts = {}
    if is_fusion_config(config):
        own = {name: directory / name for name in list_fused_names(config)}
        parts = {name: read_adapter_directory(d, values) for name, d in own.items() if d.is_dir()}
    return PublicAdapter(config, tensors, facts, extra, head, parts)


def open_merger(
    adapter_dir: Path, base_names: Mapping[str, str], stack: ExitStack, *, tied: bool
) -> WeightMerger:
    """Return the merger of a finished run's adapter.

    Args:
        adapter_dir: an adapter, ours, PEFT's or AdapterHub's, or trained weights.
        base_names: path of each weight in the model -> its name in the base's files.
        stack: closes the files of trained weights.
        tied: the base's output head shares the input embedding's weight, which a merge would
            change for both.

    Raises:
        UserError: damaged files, or no weight of the base can hold the adapter.
    """
    if contains_trained_weights(adapter_dir):
        return TrainedWeightsMerger.open_directory(adapter_dir, base_names, stack)
    return open_adapter_merger(adapter_dir, tied=tied)


def open_adapter_merger(adapter_dir: Path, *, tied: bool = False) -> WeightMerger:
    """Return the merger of an adapter directory, with its classifier's head if it has one.

    Raises:
        UserError: see ``open_merger``.
    """
    public = read_adapter_directory(adapter_dir)
    known = find_format(public.config)
    assert known is not None  # read_adapter_directory refuses others
    try:
        merger = known.open_merger(public, tied=tied)
    except UserError as error:
        raise UserError(f"{adapter_dir}: {error}") from None
    return merger if public.head is None else HeadMerger(merger, public.head.tensors)


def _explain_absent_tensors(file: Path, known: AdapterFormat) -> UserError:
    """``file`` is absent; maybe a pickle is there instead."""
    pickle = known.pickle_file
    if (file.parent / pickle).is_file():
        return UserError(
            f"{file.parent} has {pickle}, a pickle, which can run code when it is opened; save the "
            f"adapter as {file.name} ({known.safe_saving})"
        )
    return UserError(f"{file.parent} has no {file.name}; is the download complete?")


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
