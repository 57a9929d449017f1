"""QA-LoRA adapters on disk: this project's form, PEFT's, and as plain LoRA.

::

    ours       peft_type QALORA, qalora_pool sum       A [r, L], B [out, r]
    PEFT's     peft_type LORA, use_qalora true         A [r, L], B g/L
    expanded   peft_type LORA                          A [r, in]: each column g times; B

Our form has a type of its own because no other program reads the sum convention: taken for PEFT's,
the change would silently be ``L/g`` times too large or small. PEFT's form is for GPTQ linears of
gptqmodel, the only ones on which PEFT knows QA-LoRA. (On all others it ignores the switch and
trains plain LoRA.) The expanded form is the same function for everything that reads LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_peft.adapters.lora.format import build_common_config
from dist_peft.adapters.lora.tensors import build_peft_key, parse_lora_tensors
from dist_peft.adapters.low_rank.pooling import (
    POOL_KEY,
    SIZE_KEY,
    Pooling,
    pooling_sum_factor,
    read_pooling_facts,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import QaLoraConfig

__all__ = ["expand_to_plain_lora", "to_pooled_peft", "to_public_qalora"]


def to_public_qalora(
    config: QaLoraConfig,
    pooling: Pooling,
    modules: Mapping[str, Mapping[str, Tensor]],
    target_names: Sequence[str],
    base: str,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        config: the trained adapter's configuration.
        pooling: how.
        modules: module path -> ``lora_A`` and ``lora_B``, whole.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
    """
    ours = {
        **build_common_config(config, target_names, base),
        "peft_type": "QALORA",
        SIZE_KEY: pooling.size,
        POOL_KEY: pooling.convention,
    }
    tensors = {
        build_peft_key(path, name): value.contiguous()
        for path, own in modules.items()
        for name, value in own.items()
    }
    return PublicAdapter(ours, tensors)


def to_pooled_peft(public: PublicAdapter) -> PublicAdapter:
    """PEFT's own QA-LoRA. An adapter without pooling is returned as it is."""
    pooling = read_pooling_facts(public.config)
    if pooling is None or pooling.convention == "peft":
        return public
    config = {**public.config, "peft_type": "LORA", "use_qalora": True}
    del config[POOL_KEY]
    tensors = {}
    for path, module in parse_lora_tensors(public).items():
        groups = module.A.shape[1]
        factor = pooling_sum_factor(Pooling(pooling.size, "peft"), groups)
        tensors[build_peft_key(path, "lora_A")] = module.A
        tensors[build_peft_key(path, "lora_B")] = module.B / factor
    return replace(public, config=config, tensors=tensors)


def expand_to_plain_lora(public: PublicAdapter) -> PublicAdapter:
    """Plain LoRA that computes the same. An adapter without pooling is returned as it is."""
    if read_pooling_facts(public.config) is None:
        return public
    dropped = ("use_qalora", SIZE_KEY, POOL_KEY)
    config: dict[str, Any] = {k: v for k, v in public.config.items() if k not in dropped}
    config["peft_type"] = "LORA"
    config["lora_dropout"] = 0.0  # ours was on the sums; on single inputs it would be another one
    tensors = {}
    for path, module in parse_lora_tensors(public).items():
        tensors[build_peft_key(path, "lora_A")] = module.expanded_lora_A().contiguous()
        tensors[build_peft_key(path, "lora_B")] = module.B
    return replace(public, config=config, tensors=tensors)
