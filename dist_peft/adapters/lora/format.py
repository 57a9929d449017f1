"""LoRA and QA-LoRA on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's LoraConfig
    adapter_model.safetensors   base_model.model.PATH.lora_A.weight [r, in], .lora_B.weight
                                [out, r], .lora_magnitude_vector [out], and for an embedding
                                .lora_embedding_A [r, vocab], .lora_embedding_B [hidden, r]
    dist_peft.safetensors       LoftQ: PATH.removed_A, PATH.removed_B
                                adapter.through_zeros: PATH.zero_A, PATH.zero_B

PiSSA and LoftQ train ``s B A`` on a base that was changed first. PEFT applies adapters to the
original base, so the file holds the change since the start, ``s (B A - B0 A0)``, as one product of
rank ``2 r``::

    [B, -B0] [A; A0]        with alpha' such that s stays: 2 alpha, or sqrt(2) alpha with rsLoRA

An adapter trained through the quantizer has ``through_quantizer: true`` in its configuration, a key
that PEFT does not know: with the base it is another function than the trained one.

LoRA-GA has the same form and nothing else: it trains that change on the unchanged base. EVA with
other ranks (``init_rho``) has them in ``rank_pattern`` and ``alpha_pattern``, linear by linear.

A merge into the base *as training saw it* needs the two halves apart. The fact ``start: pissa`` (or
loftq) says that the first half of each linear's factors is the trained one; what was removed from
the weight before it was encoded is the second half for PiSSA, and for LoftQ an extra product, or
nothing (``adapters.lora.initialization``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.lora.initialization import RESIDUAL_INITS
from dist_peft.adapters.lora.merge import THROUGH_KEY, LoraMerger
from dist_peft.adapters.lora.tensors import MASKED_TYPE, build_peft_key, parse_lora_tensors
from dist_peft.adapters.peft_tensors import to_json_number
from dist_peft.adapters.protocol import PeftFormat, PublicAdapter
from dist_peft.adapters.targets import resolve_pattern_value
from dist_peft.core.config.run import LoraConfig, LowRankConfig

__all__ = ["LoraFormat", "build_common_config", "build_public_lora", "drop_unused_ranks"]

_FLAGS = {"use_rslora": "rslora", "use_dora": "dora"}


class LoraFormat(PeftFormat):
    """LoRA, rsLoRA, DoRA, LoRA that keeps the base's zeros (``MASKED_TYPE``), and QA-LoRA in its
    three forms (``qalora.format``)."""

    peft_types = ("LORA", "QALORA", MASKED_TYPE)

    def check(self, public: PublicAdapter) -> None:
        """Check the factors against the configuration.

        Raises:
            UserError: ``parse_lora_tensors`` refuses them.
        """
        parse_lora_tensors(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type, rank, alpha and flags."""
        settings = {"r": config.get("r"), "alpha": config.get("lora_alpha", config.get("alpha"))}
        shown = [f"{name}={value}" for name, value in settings.items() if value is not None]
        shown += [f"{name}={config.get(key, False)}" for key, name in _FLAGS.items()]
        if config.get(THROUGH_KEY):
            shown.append("trained through the quantizer (no model without its merge)")
        return " ".join([str(config["peft_type"]), *shown])

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return the reason for ``MASKED_TYPE``."""
        if config["peft_type"] != MASKED_TYPE:
            return None
        return (
            "was trained with adapter.keep_zeros: its change is cut off where the base is zero, "
            "and PEFT would apply the whole of it. dist-peft merge writes the trained model"
        )

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> LoraMerger:
        """Return the merger of the factors.

        Raises:
            UserError: ``parse_lora_tensors`` refuses them, or the embedding is adapted and tied.
        """
        return LoraMerger.from_public_adapter(public, tied=tied)


def build_public_lora(
    config: LoraConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
    target_parameters: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        config: what was trained.
        modules: module path -> own parameter name (as in ``adapters.lora``) -> whole tensor.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
        target_parameters: PEFT's (see ``adapters.lora.expert_format``).
        ranks: rank by module path where the data have decided on it (``drop_unused_ranks``).
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for path, own in modules.items():
        own = dict(own)
        for name in ("removed_A", "removed_B", "zero_A", "zero_B"):
            if name in own:
                extra[f"{path}.{name}"] = own.pop(name)
        if "start_A" in own:
            own["lora_A"] = torch.cat([own["lora_A"], own.pop("start_A")])
            own["lora_B"] = torch.cat([own["lora_B"], -own.pop("start_B")], 1)
        for name, value in own.items():
            tensors[build_peft_key(path, name)] = value.contiguous()
    facts = {"start": config.init} if config.init in RESIDUAL_INITS else {}
    plain = [path for path, own in modules.items() if "start_A" not in own]
    public = _build_peft_config(config, plain, target_names, base)
    if config.through_quantizer:
        public[THROUGH_KEY] = True
    if ranks:
        _set_module_ranks(public, config, ranks)
    if target_parameters:
        public |= _add_target_parameters(public, target_parameters)
    return PublicAdapter(public, tensors, facts, extra)


def drop_unused_ranks(
    modules: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, int]]:
    """Cut the factors of linears to the ranks that EVA has given them.

    Rows of ``A`` beyond them are zero, as are the columns of ``B``: their gradient is zero too.

    Returns:
        The modules without those of rank 0, and the rank of each linear.
    """
    kept: dict[str, Mapping[str, Tensor]] = {}
    ranks: dict[str, int] = {}
    for path, own in modules.items():
        kept[path] = own
        if "lora_A" not in own:
            continue
        ranks[path] = int(own["lora_A"].any(1).sum())
        A, B = own["lora_A"][: ranks[path]], own["lora_B"][:, : ranks[path]]
        kept[path] = {**own, "lora_A": A, "lora_B": B}
        if not ranks[path]:
            del kept[path]
    return kept, ranks


def _set_module_ranks(public: dict[str, Any], config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Give each module its rank, and the alpha with which its scaling stays."""
    alphas = {}
    for path, rank in ranks.items():
        alpha = resolve_pattern_value(config.alpha_pattern, path, config.alpha)
        share = rank / resolve_pattern_value(config.rank_pattern, path, config.r)
        alphas[path] = to_json_number(alpha * (share**0.5 if config.use_rslora else share))
    # first in the dict: PEFT takes the first key that matches
    public["rank_pattern"] = {**ranks, **public["rank_pattern"]}
    public["alpha_pattern"] = {**alphas, **public["alpha_pattern"]}


def _add_target_parameters(public: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """What changes where PEFT adapts parameters, which it does without dropout only."""
    changed: dict[str, Any] = {"target_parameters": list(targets), "lora_dropout": 0.0}
    for pattern in ("rank_pattern", "alpha_pattern"):
        known: dict[str, Any] = public[pattern]
        # of a linear it asks for the name of the weight then
        changed[pattern] = known | {rf"({key})\.weight": value for key, value in known.items()}
    return changed


def _build_peft_config(
    config: LoraConfig, plain: Sequence[str], target_names: Sequence[str], base: str
) -> dict[str, Any]:
    """``plain``: modules whose rank is not doubled although others' is."""
    doubled = config.init in (*RESIDUAL_INITS, "lora_ga")
    rank_factor = 2 if doubled else 1
    alpha_factor = (2**0.5 if config.use_rslora else 2) if doubled else 1
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if doubled:  # first in the dict: PEFT takes the first key that matches
        for path in plain:
            ranks[path] = resolve_pattern_value(config.rank_pattern, path, config.r)
            alphas[path] = to_json_number(
                resolve_pattern_value(config.alpha_pattern, path, config.alpha)
            )
    ranks |= {key: r * rank_factor for key, r in config.rank_pattern.items()}
    alphas |= {key: to_json_number(a * alpha_factor) for key, a in config.alpha_pattern.items()}
    return {
        **build_common_config(config, target_names, base),
        **({"peft_type": MASKED_TYPE} if config.keep_zeros else {}),
        "r": config.r * rank_factor,
        "lora_alpha": to_json_number(config.alpha * alpha_factor),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def build_common_config(
    config: LowRankConfig, target_names: Sequence[str], base: str
) -> dict[str, Any]:
    """PEFT's keys that do not depend on the method."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": to_json_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(target_names),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: to_json_number(a) for key, a in config.alpha_pattern.items()},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
