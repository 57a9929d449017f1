"""The adapter beside a base that was exported as training saw it.

PiSSA and LoftQ adapters are stored as the change since their start, relative to the *original*
base (``adapters.peft_format``). Beside the base as trained, whose start was taken away, only the
trained half of the factors belongs. A QA-LoRA adapter is written as the plain LoRA that computes
the same.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dist_peft.adapters.directory import read_adapter, write_adapter
from dist_peft.adapters.protocol import PublicAdapter, pattern_value
from dist_peft.adapters.qalora.format import as_expanded

__all__ = ["write_adapter_beside"]

_PREFIX = "base_model.model."


def write_adapter_beside(adapter_dir: Path, out: Path) -> None:
    """Write ``out/adapter``, in the format of PEFT.

    Raises:
        UserError: the adapter is damaged, or the directory cannot be written.
    """
    public = as_expanded(read_adapter(adapter_dir))
    if "start" in public.facts:
        public = _without_start(public)
    # the base that belongs to it, which AutoPeftModel loads
    config = {**public.config, "base_model_name_or_path": str(out.resolve())}
    write_adapter(out / "adapter", replace(public, config=config), {})


def _without_start(public: PublicAdapter) -> PublicAdapter:
    """``[B, -B0] [A; A0]`` of rank ``2 r`` -> ``B A`` of rank ``r``.

    Ranks and alphas are then named module by module, since some (embeddings) were not doubled.
    """
    factor = 2**0.5 if public.config.get("use_rslora") else 2
    rank, alpha = public.config["r"] // 2, public.config["lora_alpha"] / factor
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = dict(public.tensors)
    for name, value in public.tensors.items():
        path, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not kind.startswith(("A", "embedding_A")):
            continue
        own_alpha = pattern_value(
            public.config.get("alpha_pattern", {}), path, public.config["lora_alpha"]
        )
        own_rank = value.shape[0]
        if kind.startswith("A"):  # of a linear; an embedding's is called lora_embedding_A
            own_rank, own_alpha = own_rank // 2, own_alpha / factor
            other = name.replace(".lora_A.", ".lora_B.")
            tensors[name] = value[:own_rank].contiguous()
            tensors[other] = tensors[other][:, :own_rank].contiguous()
        if own_rank != rank:
            ranks[path] = own_rank
        if own_alpha != alpha:
            alphas[path] = own_alpha
    config = {**public.config, "r": rank, "lora_alpha": alpha}
    return PublicAdapter(config | {"rank_pattern": ranks, "alpha_pattern": alphas}, tensors)
