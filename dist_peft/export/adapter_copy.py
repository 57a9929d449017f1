"""Write the adapter that belongs to an export of the base as training saw it.

PiSSA and LoftQ adapters are stored as the change since initialization, relative to the *original*
base (``adapters.lora.initialization``). The base as trained is the residual, without the product
of the initial factors: it needs only the trained half of the stored factors. A QA-LoRA adapter is
written as the plain LoRA that computes the same function.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.qalora.format import expand_to_plain_lora
from dist_peft.adapters.targets import resolve_pattern_value

__all__ = ["write_adapter_copy"]

_PREFIX = "base_model.model."


def write_adapter_copy(adapter_dir: Path, out: Path, base: Path | None = None) -> None:
    """Write ``out/adapter`` in PEFT's format, with ``base`` as its base; default: ``out``.

    Raises:
        UserError: the adapter is damaged, or the directory cannot be written.
    """
    public = expand_to_plain_lora(read_adapter_directory(adapter_dir))
    if "start" in public.facts:
        public = _strip_initial_factors(public)
    # AutoPeftModel loads the base from this path
    config = {**public.config, "base_model_name_or_path": str((base or out).resolve())}
    write_adapter_directory(out / "adapter", replace(public, config=config), {})


def _strip_initial_factors(public: PublicAdapter) -> PublicAdapter:
    """Reduce ``[B, -B0] [A; A0]`` of rank ``2 r`` to ``B A`` of rank ``r``.

    Ranks and alphas are then listed per module, since some (embeddings) were not doubled.
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
        own_alpha = resolve_pattern_value(
            public.config.get("alpha_pattern", {}), path, public.config["lora_alpha"]
        )
        own_rank = value.shape[0]
        if kind.startswith("A"):  # a linear; an embedding's factor is called lora_embedding_A
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
