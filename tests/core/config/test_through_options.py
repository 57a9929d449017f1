"""Options of training through the quantizer."""

import pytest

from dist_peft.core.config.through_options import ThroughConfig


def test_a_start_needs_the_training_that_it_is_for() -> None:
    assert ThroughConfig().through_start == "auto"
    for start in ("auto", "none"):
        ThroughConfig(through_start=start)
    for start in ("8bit", "lora"):
        ThroughConfig(through_start=start, through_quantizer=True)
        with pytest.raises(ValueError, match=f"through_start: {start} is for through_quantizer"):
            ThroughConfig(through_start=start)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="through_start_share"):
            ThroughConfig(through_start_share=share)


def test_trained_zeros_need_rows_that_are_encoded_in_each_step() -> None:
    assert ThroughConfig(through_quantizer=True, through_zeros=True, through_start="8bit")
    with pytest.raises(ValueError, match="through_zeros is for through_quantizer"):
        ThroughConfig(through_zeros=True)
    with pytest.raises(ValueError, match="lora the first steps encode nothing"):
        ThroughConfig(through_quantizer=True, through_zeros=True, through_start="lora")
