"""Files of Hugging Face PEFT, which every adapter format of PEFT's methods has in common."""

from collections.abc import Mapping
from typing import Any

__all__ = ["PeftFormat"]


class PeftFormat:
    """Base class of formats that are found by ``peft_type`` (``adapters.adapter_format``)."""

    peft_types: tuple[str, ...] = ()
    config_file = "adapter_config.json"
    tensors_file = "adapter_model.safetensors"
    pickle_file = "adapter_model.bin"
    safe_saving = "PEFT: save_pretrained(..., safe_serialization=True)"
    joins_head = True
    on_gptq_linears = True

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether ``peft_type`` is one of ``peft_types``."""
        return config.get("peft_type") in self.peft_types

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return None: PEFT loads the adapter."""
        return None
