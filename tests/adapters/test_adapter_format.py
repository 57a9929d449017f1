"""One table instead of switches: every format finds itself, and only itself."""

from typing import Any

import pytest

from dist_peft.adapters.adalora.format import AdaLoraFormat
from dist_peft.adapters.adapter_format import ADAPTER_FORMATS, PEFT_TYPES, find_format
from dist_peft.adapters.bottleneck.format import BottleneckFormat
from dist_peft.adapters.fusion.format import FusionFormat
from dist_peft.adapters.ia3.format import Ia3Format
from dist_peft.adapters.loha.format import LohaFormat
from dist_peft.adapters.lokr.format import LokrFormat
from dist_peft.adapters.lora.format import LoraFormat
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.adapters.vera.format import VeraFormat
from dist_peft.adapters.virtual_tokens.format import VirtualTokensFormat
from dist_peft.core.errors import UserError

BOTTLENECK: dict[str, Any] = {"config": {"mh_adapter": False}, "name": "x", "version": "1"}
FUSION: dict[str, Any] = {"config": {"query_before_ln": False}, "name": "a,b"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LORA"}, LoraFormat),
        ({"peft_type": "QALORA"}, LoraFormat),
        ({"peft_type": "ADALORA"}, AdaLoraFormat),
        ({"peft_type": "VERA"}, VeraFormat),
        ({"peft_type": "LOHA"}, LohaFormat),
        ({"peft_type": "LOKR"}, LokrFormat),
        ({"peft_type": "IA3"}, Ia3Format),
        ({"peft_type": "P_TUNING"}, VirtualTokensFormat),
        ({"peft_type": "P_TUNING_PLACED"}, VirtualTokensFormat),
        (BOTTLENECK, BottleneckFormat),
        (FUSION, FusionFormat),
    ],
)
def test_a_configuration_finds_its_format(config: dict[str, Any], expected: type) -> None:
    assert isinstance(find_format(config), expected)


@pytest.mark.parametrize("config", [{}, {"peft_type": "BONE"}, {"config": "text"}])
def test_an_unknown_configuration_has_none(config: dict[str, Any]) -> None:
    assert find_format(config) is None


def test_types_of_peft_are_claimed_once() -> None:
    assert len(set(PEFT_TYPES)) == len(PEFT_TYPES)
    for name in PEFT_TYPES:
        assert sum(known.matches({"peft_type": name}) for known in ADAPTER_FORMATS) == 1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "virtual tokens change no weight"),
        (BOTTLENECK, "the adapter is a bottleneck: between its matrices is a nonlinearity"),
        (FUSION, "the adapter is a fusion of bottlenecks"),
    ],
)
def test_methods_that_are_no_weight_refuse_the_merge(config: dict[str, Any], reason: str) -> None:
    known = find_format(config)
    assert known is not None
    with pytest.raises(UserError, match=reason):
        known.open_merger(PublicAdapter(config, {}), tied=False)


def test_only_formats_that_peft_lacks_have_a_reason() -> None:
    have = [name for name in PEFT_TYPES if _reason({"peft_type": name}) is None]
    ours = ("P_TUNING_PLACED", "MASKED_LORA")
    assert have == [name for name in PEFT_TYPES if name not in ours]
    assert "PEFT would apply the whole of it" in str(_reason({"peft_type": "MASKED_LORA"}))
    assert "PEFT does not have" in str(_reason(BOTTLENECK))


def _reason(config: dict[str, Any]) -> str | None:
    known = find_format(config)
    assert known is not None
    return known.explain_no_peft_form(config)
