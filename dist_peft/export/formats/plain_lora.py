"""An adapter as factors of linears, for formats that know plain LoRA alone.

Such a format has one scaling for the whole adapter, while PEFT's may have one a module (rsLoRA with
several ranks, ``alpha_pattern``). Then ``B`` is multiplied by it::

    W + s B A = W + 1 (s B) A
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dist_peft.adapters.directory import check_public_adapter, read_adapter_directory
from dist_peft.adapters.lora.tensors import parse_lora_tensors
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.qalora.format import expand_to_plain_lora
from dist_peft.core.config.run import AdapterConfig
from dist_peft.core.errors import UserError
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_linear import describe_stored_otherwise

__all__ = ["LinearFactors", "find_plain_lora_obstacle", "read_plain_lora"]


@dataclass(frozen=True)
class LinearFactors:
    """``A`` ``[r, in]``, ``B`` ``[out, r]`` and ``s`` of one linear, float32."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaled_B(self) -> Tensor:
        """``s B``."""
        return self.B * self.scaling


def find_plain_lora_obstacle(config: AdapterConfig, model: nn.Module) -> str | None:
    """Return why a run with this adapter will be more than LoRA of linears; None: it will not."""
    if config.kind not in ("lora", "qalora"):
        return f"the format holds LoRA, not adapter.kind {config.kind}"
    for key in ("use_dora", "embeddings"):
        if getattr(config, key, False):
            return f"the format holds LoRA of linears alone, without adapter.{key}"
    if any(isinstance(module, ExpertStack) for module in model.modules()):
        return "the base is a mixture of experts"
    if reason := describe_stored_otherwise(model):
        return f"{reason}; use --format peft"
    return None


def read_plain_lora(directory: Path, format_name: str) -> Mapping[str, LinearFactors]:
    """Return the factors of an adapter by the path of the linear; QA-LoRA expanded.

    Args:
        directory: of the adapter.
        format_name: for messages.

    Raises:
        UserError: the adapter is damaged, or more than LoRA of linears.
    """
    public = read_adapter_directory(directory)
    check_public_adapter(public)
    if public.config.get("peft_type") not in ("LORA", "QALORA"):
        kind = public.config.get("peft_type") or "AdapterHub's"
        raise UserError(f"format {format_name} holds LoRA, not an adapter of type {kind}")
    reason = _find_excess(public)
    if reason is not None:
        raise UserError(
            f"format {format_name} holds LoRA of linears alone, and {directory} has {reason}; "
            "merge the run instead"
        )
    modules = parse_lora_tensors(expand_to_plain_lora(public))
    return {path: LinearFactors(m.A, m.B, m.scaling) for path, m in modules.items()}


def _find_excess(public: PublicAdapter) -> str | None:
    if public.head is not None:
        return "a classifier's head" if public.head.labels else "trained routers"
    for path, module in parse_lora_tensors(public).items():
        if module.magnitude is not None:
            return f"DoRA's magnitudes, such as that of {path}"
        if module.is_embedding:
            return f"an embedding, {path}"
        if module.experts > 1:
            return f"experts, {path}"
    return None
