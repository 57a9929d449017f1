"""Checks of the adapter section against the others."""

from collections.abc import Collection

from dist_peft.core.config.adapter import AdapterConfig, LoraConfig, VirtualTokensConfig
from dist_peft.core.config.quantization import QuantConfig
from dist_peft.core.config.through_options import ThroughStart

__all__ = [
    "NESTED_SCALES",
    "check_adapter_options",
    "check_through_quantizer",
    "check_through_start",
]

NESTED_SCALES = (
    "adapter.through_quantizer: nested scales of an NF4 base are quantized within each row here "
    "and across rows by bitsandbytes, so that no NF4 model could hold the trained weights; set "
    "base.quant.double_quant: false"
)


def check_adapter_options(adapter: AdapterConfig, solver: str, layer_decay: float) -> None:
    """Compare the section with ``base.quant.solver`` and ``train.layer_decay``.

    Raises:
        ValueError: a base of that solver has other zeros than the pruned one, which are to be kept;
            or there is nothing in the blocks that rates could be for.
    """
    if isinstance(adapter, LoraConfig) and adapter.keep_zeros and solver in ("hqq", "gptq"):
        raise ValueError(
            f"adapter.keep_zeros: base.quant.solver {solver} need not store a zero as zero, so "
            "that pruned weights would be trained; use solver: rtn, kind: nf4 or quant: null"
        )
    if layer_decay != 1 and isinstance(adapter, VirtualTokensConfig):
        raise ValueError(
            f"train.layer_decay: adapter.kind {adapter.kind} has no parameters in the blocks; "
            "leave it out"
        )


def check_through_quantizer(
    adapter: AdapterConfig, quant: QuantConfig | None, stated: Collection[str] = ("quant",)
) -> None:
    """Check that a base of ``base.quant`` can be trained through its quantizer, if that is asked.

    Args:
        stated: keys of ``base`` that the user states. Without ``quant`` the base may come
            quantized: its linears decide.

    Raises:
        ValueError: a start in the base's own bits. (Nested scales are refused by the linears that
            have them: those of a base that comes quantized are float32 here.)
    """
    if not isinstance(adapter, LoraConfig) or not adapter.through_quantizer:
        return
    if quant is None or "quant" not in stated:
        return
    if adapter.through_start == "8bit" and quant.bits == 8:
        raise ValueError(
            "adapter.through_start: 8bit is for fewer bits, and base.quant.bits is 8; leave it out"
        )


def check_through_start(start: ThroughStart, selects: bool, tasks: str) -> None:
    """Check that a run can pass from ``start`` to the base's format.

    Args:
        start: ``adapter.through_start``; auto, none: not checked.
        selects: held-out losses decide when the run ends or which checkpoint is best.
        tasks: ``train.tasks``.

    Raises:
        ValueError: losses of both forms would be compared, or several adapters share a model.
    """
    if start in ("auto", "none"):
        return
    key = f"adapter.through_start: {start}"
    if selects:
        raise ValueError(
            f"{key}: the first steps are evaluated in another form, mostly with a lower loss, "
            "which train.early_stop and save.keep_best would compare with the later ones; leave "
            "these out, or set through_start: none"
        )
    if tasks == "separate":
        raise ValueError(
            f"{key} loads the base again in the middle of a run, which train.tasks: separate "
            "loads once for all; train the tasks one by one, or set through_start: none"
        )
