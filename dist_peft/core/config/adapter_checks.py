"""Checks of the adapter section against the others."""

from dist_peft.core.config.adapter import AdapterConfig, LoraConfig, VirtualTokensConfig
from dist_peft.core.config.quantization import QuantConfig

__all__ = ["check_adapter_options", "check_through_quantizer"]


def check_adapter_options(adapter: AdapterConfig, solver: str, layer_decay: float) -> None:
    """Compare the section with ``base.quant.solver`` and ``train.layer_decay``.

    Raises:
        ValueError: a base of that solver has other zeros than the pruned one, which are to be kept;
            or there is nothing in the blocks that rates could be for.
    """
    if isinstance(adapter, LoraConfig) and adapter.keep_zeros and solver != "rtn":
        raise ValueError(
            f"adapter.keep_zeros: base.quant.solver {solver} need not store a zero as zero, so "
            "that pruned weights would be trained; use solver: rtn, kind: nf4 or quant: null"
        )
    if layer_decay != 1 and isinstance(adapter, VirtualTokensConfig):
        raise ValueError(
            f"train.layer_decay: adapter.kind {adapter.kind} has no parameters in the blocks; "
            "leave it out"
        )


def check_through_quantizer(adapter: AdapterConfig, quant: QuantConfig | None) -> None:
    """Check that a base of ``base.quant`` can be trained through its quantizer, if that is asked.

    Raises:
        ValueError: nested scales, which no other library has, or codes that are chosen once.
    """
    if not isinstance(adapter, LoraConfig) or not adapter.through_quantizer or quant is None:
        return
    if quant.has_nested_scales:
        raise ValueError(
            "adapter.through_quantizer: nested scales of an NF4 base are quantized within each row "
            "here and across rows by bitsandbytes, so that no NF4 model could hold the trained "
            "weights; set base.quant.double_quant: false"
        )
    if quant.solver == "gptq":
        raise ValueError(
            "adapter.through_quantizer chooses codes again after each step, which solver gptq does "
            "once with calibration data; set base.quant.solver: rtn or hqq"
        )
