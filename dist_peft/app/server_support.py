"""Whether vLLM serves an adapter, from its configuration alone.

The rules follow vLLM's documentation of LoRA adapters and ``--max-lora-rank``: LoRA in PEFT's
format without DoRA, biases and ``modules_to_save``, of a rank up to that option (16 if it is not
given), and not ``target_parameters``, LoRA on fused experts. vLLM itself was not run here: an
answer of "yes" says that nothing in the configuration is known to be in the way.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_vllm_support"]

_DEFAULT_RANK = 16
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank``."""


def describe_vllm_support(config: Mapping[str, Any]) -> str:
    """Return ``yes``, ``yes, with ...``, or ``no: `` and the reasons.

    Args:
        config: ``adapter_config.json``; another library's counts as no LoRA.
    """
    reasons = _list_obstacles(config)
    ranks = [config.get("r"), *_read_values(config.get("rank_pattern"))]
    largest = max((r for r in ranks if type(r) is int), default=0)
    fitting = next((limit for limit in _RANKS if limit >= largest), None)
    if fitting is None:
        reasons.append(f"rank {largest} is above its largest, {_RANKS[-1]}")
    if reasons:
        return "no: " + "; ".join(reasons)
    return "yes" if largest <= _DEFAULT_RANK else f"yes, with --max-lora-rank {fitting}"


def _list_obstacles(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind == "QALORA" or config.get("use_qalora"):
        return ["QA-LoRA; export it with --format peft-expanded"]
    if kind != "LORA":
        return [f"it serves LoRA, not {kind or 'a configuration without peft_type'}"]
    reasons = []
    if config.get("use_dora"):
        reasons.append("DoRA (use_dora); merge the run")
    if config.get("bias") not in (None, "none"):
        reasons.append(f"biases (bias: {config['bias']})")
    if config.get("lora_bias"):
        reasons.append("biases (lora_bias)")
    if config.get("modules_to_save"):
        reasons.append(f"modules_to_save: {', '.join(map(str, config['modules_to_save']))}")
    if config.get("target_parameters"):
        reasons.append(
            "LoRA on fused experts (target_parameters); export it with --format peft-experts"
        )
    if any(_read_values(config.get("alpha_pattern"))):
        reasons.append("alpha_pattern, of which it reads nothing; merge the run")
    if any(_read_values(config.get("rank_pattern"))):
        reasons.append("rank_pattern, which it does not read; merge the run")
    return reasons


def _read_values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, Mapping) else []
