"""The adapter beside a base that was exported as training saw it.

PiSSA and LoftQ adapters are stored as the change since their start, relative to the *original*
base (``adapters.peft_format``). Beside the base as trained, whose start was taken away, only the
trained half of the factors belongs: the other half of B is set to zero, which leaves ranks and
scaling alone. A QA-LoRA adapter is written as the plain LoRA that computes the same.
"""

from pathlib import Path

from dist_peft.adapters.peft_format import read_adapter, write_adapter
from dist_peft.adapters.qalora_format import as_expanded

__all__ = ["write_adapter_beside"]


def write_adapter_beside(adapter_dir: Path, out: Path) -> None:
    """Write ``out/adapter``, in the format of PEFT.

    Raises:
        UserError: the adapter is damaged, or the directory cannot be written.
    """
    public = as_expanded(read_adapter(adapter_dir))
    if "start" in public.facts:
        for name, value in public.tensors.items():
            if name.endswith(".lora_B.weight"):
                value = value.clone()
                value[:, value.shape[1] // 2 :] = 0
                public.tensors[name] = value
        public.facts.clear()
        public.extra.clear()
    write_adapter(out / "adapter", public, {})
