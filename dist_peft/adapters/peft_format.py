"""LoRA adapters on disk, in the format of Hugging Face PEFT.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_peft.adapters.base import PublicAdapter, pattern_value
from dist_peft.core.config import LoraConfig
from dist_peft.core.errors import UserError
from dist_peft.store.writer import atomic_write

__all__ = ["Factors", "factors", "public_lora", "read_adapter", "read_metadata", "write_adapter"]

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_METADATA = "dist_peft.json"
_EXTRA = "dist_peft.safetensors"

_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "saved_base": "base_layer.weight",
}

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


@dataclass(frozen=True)
class Factors:
    """One adapted module of a public adapter, float32.

    Attributes:
        A, B: ``[r, in]``, ``[out, r]``; of an embedding ``[r, vocab]``, ``[hidden, r]``.
        scaling: ``s``.
        magnitude: ``[out]`` with DoRA.
        is_embedding: the weight is ``[vocab, hidden]``, so its change is ``s (B A)^T``.
        saved_base: copy of the base weight that PEFT stores beside an adapted embedding.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None
    is_embedding: bool
    saved_base: Tensor | None


# -- making ------------------------------------------------------------------------------------


def public_lora(
    config: LoraConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        config: what was trained.
        modules: module path -> own parameter name (as in ``adapters.lora``) -> whole tensor.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
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
            tensors[f"{_PREFIX}{path}.{_SUFFIXES[name]}"] = value.contiguous()
    facts = {"start": config.init} if config.init != "default" else {}
    plain = [path for path, own in modules.items() if "start_A" not in own]
    return PublicAdapter(_peft_config(config, plain, target_names, base), tensors, facts, extra)


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
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r * rank_factor,
        "lora_alpha": _number(config.alpha * alpha_factor),
        "lora_dropout": config.dropout,
        "target_modules": list(target_names),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _number(value: float) -> float:
    """Whole numbers as ``int``: some readers of ``lora_alpha`` take nothing else."""
    return int(value) if float(value).is_integer() else value


# -- files -------------------------------------------------------------------------------------


def write_adapter(directory: Path, public: PublicAdapter, metadata: Mapping[str, Any]) -> None:
    """Write a directory that PEFT loads. Each file is written whole or not at all.

    Args:
        directory: made if it does not exist.
        public: the adapter.
        metadata: further contents of ``dist_peft.json``; must be plain JSON.

    Raises:
        RuntimeError: a tensor is empty, has the wrong shape or lacks its partner.
        UserError: the disk is full or the directory cannot be written.
    """
    try:
        factors(public)
    except UserError as error:
        raise RuntimeError(f"refusing to write a damaged adapter: {error}") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {directory}: {error.strerror}") from None
    header = {"format": "pt"}
    if public.extra:
        atomic_write(directory / _EXTRA, safetensors.torch.save(public.extra, header))
    else:
        (directory / _EXTRA).unlink(missing_ok=True)
    atomic_write(directory / _TENSORS, safetensors.torch.save(public.tensors, header))
    facts = {**metadata, "adapter": public.facts}
    atomic_write(directory / _METADATA, json.dumps(facts, indent=2) + "\n")
    atomic_write(directory / _CONFIG, json.dumps(public.config, indent=2) + "\n")


def read_adapter(directory: Path) -> PublicAdapter:
    """Read a LoRA directory, ours or PEFT's own.

    Raises:
        UserError: no such adapter, another method, damaged, or one that cannot be read safely.
    """
    config = _read_json(directory / _CONFIG)
    if config is None:
        raise UserError(f"{directory} has no {_CONFIG}; give the directory of a PEFT adapter")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{directory / _CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA is read"
        )
    if not (directory / _TENSORS).is_file():
        if (directory / "adapter_model.bin").is_file():
            raise UserError(
                f"{directory} has adapter_model.bin, a pickle, which can run code when it is "
                f"opened; save the adapter as {_TENSORS} (PEFT: save_pretrained(..., "
                "safe_serialization=True))"
            )
        raise UserError(f"{directory} has no {_TENSORS}; is the download complete?")
    facts = read_metadata(directory).get("adapter", {})
    extra = _read_tensors(directory / _EXTRA) if (directory / _EXTRA).is_file() else {}
    return PublicAdapter(config, _read_tensors(directory / _TENSORS), facts, extra)


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; get it again") from None


# -- meaning -----------------------------------------------------------------------------------


def factors(public: PublicAdapter) -> dict[str, Factors]:
    """Module path -> its factors, with every shape checked against the configuration.

    Raises:
        UserError: a tensor is empty, has the wrong shape, lacks its partner or is none of LoRA's;
            or the adapter uses something besides LoRA, rsLoRA and DoRA.
    """
    _check_config(public)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in public.tensors.items():
        path, name = _parse(key)
        if value.numel() == 0:
            raise UserError(
                f"adapter tensor {key} is empty: the adapter was saved without its data"
            )
        modules.setdefault(path, {})[name] = value
    if not modules:
        raise UserError("the adapter has no tensors: it was saved without its data")
    return {path: _factors(path, own, public.config) for path, own in modules.items()}


def _check_config(public: PublicAdapter) -> None:
    config = public.config
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(
            f"the adapter was trained with {used[0]}, which is more than LoRA, rsLoRA and DoRA and "
            "would be lost; merge it with PEFT itself"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"the adapter was trained on a changed base (init_lora_weights: {start}) and does not "
            "fit the original one; save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) or merge it with PEFT itself"
        )


def _parse(key: str) -> tuple[str, str]:
    """Tensor name in the file -> (module path, own name)."""
    stem = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
    for name, suffix in _SUFFIXES.items():
        if stem.startswith(_PREFIX) and stem.endswith(f".{suffix}"):
            return stem[len(_PREFIX) : -len(suffix) - 1], name
    raise UserError(f"adapter tensor {key} is no LoRA tensor; merge this adapter with PEFT itself")


def _factors(path: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    try:
        r = int(pattern_value(config.get("rank_pattern") or {}, path, config["r"]))
        alpha = float(pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{_CONFIG} gives {path} no usable r and lora_alpha ({type(error).__name__}: {error})"
        ) from None
    is_embedding = any(name.startswith("lora_embedding") for name in own)
    name_a, name_b = (
        ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    )
    for name in (name_a, name_b):
        if name not in own:
            raise UserError(f"adapter tensor {_PREFIX}{path}.{_SUFFIXES[name]} is absent")
    A, B, magnitude = own[name_a], own[name_b], own.get("magnitude")
    if is_embedding and magnitude is not None:
        raise UserError(f"{path}: DoRA on an embedding is not supported; merge it with PEFT itself")
    _check_shape(path, name_a, A, (r, None))
    _check_shape(path, name_b, B, (None, r))
    if magnitude is not None:
        _check_shape(path, "magnitude", magnitude, (B.shape[0],))
    return Factors(
        A.float(),
        B.float(),
        alpha / (r**0.5 if config.get("use_rslora") else r),
        None if magnitude is None else magnitude.float(),
        is_embedding,
        own.get("saved_base"),
    )


def _check_shape(path: str, name: str, value: Tensor, wanted: tuple[int | None, ...]) -> None:
    """``None`` in ``wanted`` stands for any size."""
    fits = value.dim() == len(wanted) and all(
        size is None or size == found for size, found in zip(wanted, value.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("*" if size is None else str(size) for size in wanted)
        raise UserError(
            f"adapter tensor {_PREFIX}{path}.{_SUFFIXES[name]} has shape {list(value.shape)}, not "
            f"[{shown}] as its configuration says"
        )
