"""The adapter section against base and training."""

import pytest

from dist_peft.core.config.adapter import Ia3Config, LoraConfig, PromptConfig
from dist_peft.core.config.adapter_checks import (
    check_adapter_options,
    check_through_quantizer,
    check_through_start,
)
from dist_peft.core.config.quantization import QuantConfig


def test_solver_without_zeros_and_rates_without_blocks_are_refused() -> None:
    kept = LoraConfig(keep_zeros=True)
    check_adapter_options(kept, "rtn", 0.9)
    check_adapter_options(LoraConfig(), "hqq", 0.9)
    with pytest.raises(ValueError, match="solver hqq need not store a zero as zero"):
        check_adapter_options(kept, "hqq", 1)
    check_adapter_options(PromptConfig(), "rtn", 1)
    with pytest.raises(ValueError, match="prompt has no parameters in the blocks"):
        check_adapter_options(PromptConfig(), "rtn", 0.9)


def test_bases_that_are_not_trained_through_their_quantizer() -> None:
    through, nested = LoraConfig(through_quantizer=True), QuantConfig()
    check_through_quantizer(through, nested)  # the linears decide: they may come quantized
    check_through_quantizer(through, QuantConfig(kind="int", solver="gptq"))
    started = LoraConfig(through_quantizer=True, through_start="8bit")
    with pytest.raises(ValueError, match="8bit is for fewer bits"):
        check_through_quantizer(started, QuantConfig(kind="int", bits=8))
    check_through_quantizer(started, QuantConfig(kind="int", bits=3))
    check_through_quantizer(through, QuantConfig(double_quant=False))
    check_through_quantizer(through, None)
    check_through_quantizer(through, nested, stated=())  # the base may come quantized
    check_through_quantizer(LoraConfig(), nested)
    check_through_quantizer(Ia3Config(), nested)


def test_a_start_in_another_form_is_not_compared_with_the_rest() -> None:
    with pytest.raises(ValueError, match=r"train\.early_stop and save\.keep_best would compare"):
        check_through_start("8bit", True, "mixed")
    with pytest.raises(ValueError, match="in the middle of a run"):
        check_through_start("lora", False, "separate")
    check_through_start("lora", False, "mixed")
    for start in ("auto", "none"):
        check_through_start(start, True, "separate")
