"""Adapters on disk, in the format of Hugging Face PEFT: LoRA, and what all methods share.

QA-LoRA's form is in ``qalora_format``, that of virtual tokens in ``prompt_format``; bottleneck
adapters, unknown to PEFT, have AdapterHub's files (``adapterhub_format``).

A directory holds what PEFT reads, and up to two files that only this project reads::

    adapter_config.json         PEFT's LoraConfig
    adapter_model.safetensors   base_model.model.PATH.lora_A.weight [r, in], .lora_B.weight
                                [out, r], .lora_magnitude_vector [out], and for an embedding
                                .lora_embedding_A [r, vocab], .lora_embedding_B [hidden, r]
    dist_peft.json              where the adapter comes from, and ``adapter``: the facts below
    dist_peft.safetensors       LoftQ: PATH.removed_A, PATH.removed_B

PiSSA and LoftQ train ``s B A`` on a base that was changed first. PEFT applies adapters to the
original base, so the file holds the change since the start, ``s (B A - B0 A0)``, as one product of
rank ``2 r``::

    [B, -B0] [A; A0]        with alpha' such that s stays: 2 alpha, or sqrt(2) alpha with rsLoRA

A merge into the base *as training saw it* needs the two halves apart. The fact ``start: pissa`` (or
loftq) says that the first half of each linear's factors is the trained one; what was removed from
the weight before it was encoded is the second half for PiSSA, and for LoftQ an extra product, or
nothing (``adapters.start``).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_peft.adapters.bottleneck import format as adapterhub_format
from dist_peft.adapters.bottleneck.format import bottleneck_tensors, is_adapterhub
from dist_peft.adapters.classifier_head.format import (
    SAFE_HEAD,
    join_peft_head,
    read_head,
    split_peft_head,
    write_adapterhub_head,
)
from dist_peft.adapters.fusion import format as fusion_format
from dist_peft.adapters.fusion.format import fusion_names, fusion_tensors, is_fusion
from dist_peft.adapters.lora.tensors import factors, tensor_name
from dist_peft.adapters.protocol import PublicAdapter, pattern_value
from dist_peft.adapters.tensor_checks import check_tensor_values
from dist_peft.adapters.virtual_tokens.format import PROMPT_TYPES, check_prompt
from dist_peft.adapters.written_config import WRITTEN_CONFIG, refuse_edited_config
from dist_peft.core.config.run import LoraConfig, LowRankConfig
from dist_peft.core.errors import UserError
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.writer import atomic_write

__all__ = [
    "WEIGHT_KINDS",
    "check_adapter",
    "common_config",
    "config_file",
    "factors",
    "public_lora",
    "read_adapter",
    "read_metadata",
    "tensors_file",
    "write_adapter",
]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_METADATA = "dist_peft.json"
_EXTRA = "dist_peft.safetensors"
WEIGHT_KINDS = ("full", "partial")
"""``kind`` in the ``dist_peft.json`` of trained weights (``adapters.weights_format``)."""

_TYPES = ("LORA", "QALORA", *PROMPT_TYPES)

# -- making ------------------------------------------------------------------------------------


def public_lora(
    config: LoraConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
    target_parameters: Sequence[str] = (),
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        config: what was trained.
        modules: module path -> own parameter name (as in ``adapters.lora``) -> whole tensor.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
        target_parameters: PEFT's (see ``expert_format``).
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for path, own in modules.items():
        own = dict(own)
        for factor in "AB":
            if f"removed_{factor}" in own:
                extra[f"{path}.removed_{factor}"] = own.pop(f"removed_{factor}")
        if "start_A" in own:
            own["lora_A"] = torch.cat([own["lora_A"], own.pop("start_A")])
            own["lora_B"] = torch.cat([own["lora_B"], -own.pop("start_B")], 1)
        for name, value in own.items():
            tensors[tensor_name(path, name)] = value.contiguous()
    facts = {"start": config.init} if config.init != "default" else {}
    plain = [path for path, own in modules.items() if "start_A" not in own]
    public = _peft_config(config, plain, target_names, base)
    if target_parameters:
        public |= _with_parameters(public, target_parameters)
    return PublicAdapter(public, tensors, facts, extra)


def _with_parameters(public: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """What changes where PEFT adapts parameters, which it does without dropout only."""
    changed: dict[str, Any] = {"target_parameters": list(targets), "lora_dropout": 0.0}
    for pattern in ("rank_pattern", "alpha_pattern"):
        known: dict[str, Any] = public[pattern]
        # of a linear it asks for the name of the weight then
        changed[pattern] = known | {rf"({key})\.weight": value for key, value in known.items()}
    return changed


def _peft_config(
    config: LoraConfig, plain: Sequence[str], target_names: Sequence[str], base: str
) -> dict[str, Any]:
    """``plain``: modules whose rank is not doubled although others' is."""
    doubled = config.init != "default"
    rank_factor = 2 if doubled else 1
    alpha_factor = (2**0.5 if config.use_rslora else 2) if doubled else 1
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if doubled:  # first in the dict: PEFT takes the first key that matches
        for path in plain:
            ranks[path] = pattern_value(config.rank_pattern, path, config.r)
            alphas[path] = _number(pattern_value(config.alpha_pattern, path, config.alpha))
    ranks |= {key: r * rank_factor for key, r in config.rank_pattern.items()}
    alphas |= {key: _number(a * alpha_factor) for key, a in config.alpha_pattern.items()}
    return {
        **common_config(config, target_names, base),
        "r": config.r * rank_factor,
        "lora_alpha": _number(config.alpha * alpha_factor),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def common_config(config: LowRankConfig, target_names: Sequence[str], base: str) -> dict[str, Any]:
    """PEFT's keys that do not depend on the method."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(target_names),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _number(a) for key, a in config.alpha_pattern.items()},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def check_adapter(public: PublicAdapter) -> None:
    """See that every tensor fits the configuration.

    Raises:
        UserError: one is empty, absent, of the wrong shape or type, of another method, or holds a
            value that is not finite.
    """
    check_tensor_values({**public.tensors, **public.extra}, "the adapter")
    if public.head is not None:
        check_tensor_values(public.head.tensors, "the adapter's head")
    if is_fusion(public.config):
        fusion_tensors(public)
        for part in public.parts.values():
            bottleneck_tensors(part)
    elif is_adapterhub(public.config):
        bottleneck_tensors(public)
    elif public.config.get("peft_type") in PROMPT_TYPES:
        check_prompt(public)
    else:
        factors(public)


# -- files -------------------------------------------------------------------------------------


def config_file(directory: Path) -> Path:
    """The configuration in an adapter's directory, which may be that of a fusion, or be absent."""
    own, fusion = directory / _CONFIG, directory / fusion_format.CONFIG
    return fusion if fusion.is_file() and not own.is_file() else own


def tensors_file(config: Mapping[str, Any]) -> str:
    """Name of the file beside a configuration with these contents."""
    if is_fusion(config):
        return fusion_format.TENSORS
    return adapterhub_format.TENSORS if is_adapterhub(config) else _TENSORS


def write_adapter(directory: Path, public: PublicAdapter, metadata: Mapping[str, Any]) -> None:
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
        check_adapter(public)
    except UserError as error:
        raise RuntimeError(f"refusing to write a damaged adapter: {error}") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {directory}: {error.strerror}") from None
    about_parts = {key: value for key, value in metadata.items() if key != "labels"}
    for name, part in public.parts.items():
        write_adapter(directory / name, part, about_parts)
    header = {"format": "pt"}
    if public.extra:
        atomic_write(directory / _EXTRA, safetensors.torch.save(public.extra, header))
    else:
        (directory / _EXTRA).unlink(missing_ok=True)
    config, tensors = public.config, public.tensors
    if is_adapterhub(config):
        write_adapterhub_head(directory, public)
    else:
        config, tensors = join_peft_head(public)
    data = safetensors.torch.save(tensors, header)
    atomic_write(directory / tensors_file(public.config), data)
    facts = {**metadata, "adapter": public.facts, WRITTEN_CONFIG: dict(config)}
    atomic_write(directory / _METADATA, json.dumps(facts, indent=2) + "\n")
    file = fusion_format.CONFIG if is_fusion(config) else _CONFIG
    atomic_write(directory / file, json.dumps(config, indent=2) + "\n")


def read_adapter(directory: Path, values: bool = True) -> PublicAdapter:
    """Read a directory, ours, PEFT's or AdapterHub's own, of a method that is trained here.

    Args:
        values: false for tensors on meta: names and shapes alone are read.

    Raises:
        UserError: no such adapter, another method, damaged, one that cannot be read safely, a
            configuration changed after it was written, or tensors of a wrong type or with values
            that are not finite.
    """
    config = _read_json(config_file(directory))
    if config is None:
        if (kind := read_metadata(directory).get("kind")) in WEIGHT_KINDS:
            raise UserError(
                f"{directory} holds weights of the base that adapter.kind {kind} trained. They are "
                "no adapter, and PEFT has no format for them; make a model of the run with "
                "dist-peft merge"
            )
        raise UserError(f"{directory} has no {_CONFIG}; give the directory of a PEFT adapter")
    if not is_adapterhub(config) and config.get("peft_type") not in _TYPES:
        raise UserError(
            f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only "
            f"{', '.join(_TYPES)} are read"
        )
    file = directory / tensors_file(config)
    if not file.is_file():
        raise _no_tensors(file)
    metadata = read_metadata(directory)
    refuse_edited_config(config_file(directory), config, metadata)
    facts, labels = metadata.get("adapter", {}), tuple(metadata.get("labels", ()))
    extra = _read_tensors(directory / _EXTRA, values) if (directory / _EXTRA).is_file() else {}
    config, tensors, head = split_peft_head(config, _read_tensors(file, values), labels)
    if is_adapterhub(config) and (labels or (directory / SAFE_HEAD).is_file()):
        if not (directory / SAFE_HEAD).is_file():
            raise UserError(
                f"{directory} has no {SAFE_HEAD}, the head of the classes that its {_METADATA} "
                "names; is the download complete?"
            )
        head = read_head(_read_tensors(directory / SAFE_HEAD, values), labels)
    parts = {}
    if is_fusion(config):
        own = {name: directory / name for name in fusion_names(config)}
        parts = {name: read_adapter(d, values) for name, d in own.items() if d.is_dir()}
    return PublicAdapter(config, tensors, facts, extra, head, parts)


def _no_tensors(file: Path) -> UserError:
    """``file`` is absent; maybe a pickle is there instead."""
    pickle, mend = "adapter_model.bin", "PEFT: save_pretrained(..., safe_serialization=True)"
    if file.name == fusion_format.TENSORS:
        pickle = "pytorch_model_adapter_fusion.bin"
        mend = "adapters: save_adapter_fusion(..., use_safetensors=True)"
    if file.name == adapterhub_format.TENSORS:
        pickle, mend = "pytorch_adapter.bin", "adapters: save_adapter(..., use_safetensors=True)"
    if (file.parent / pickle).is_file():
        return UserError(
            f"{file.parent} has {pickle}, a pickle, which can run code when it is opened; save the "
            f"adapter as {file.name} ({mend})"
        )
    return UserError(f"{file.parent} has no {file.name}; is the download complete?")


def read_metadata(directory: Path) -> dict[str, Any]:
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


def _read_tensors(path: Path, values: bool) -> dict[str, Tensor]:
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


def _number(value: float) -> float:
    """Whole numbers as ``int``: some readers of ``lora_alpha`` take nothing else."""
    return int(value) if float(value).is_integer() else value
