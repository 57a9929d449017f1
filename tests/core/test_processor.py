"""Facts of the processor."""

import platform
from pathlib import Path

import pytest

from dist_peft.core.processor import describe_cpu

CPUINFO = (
    "processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU\n\nprocessor\t: 1\nmodel name\t: Other\n"
)


def test_facts_of_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: CPUINFO)
    assert describe_cpu() == "Some CPU"
    assert describe_cpu(("vendor_id", "model", "model name")) == "17 Some CPU"


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert describe_cpu() == platform.machine()
