"""The consumer of a layout is the one of the method that the output names."""

import json
from pathlib import Path

import pytest

from dist_peft.export.formats.export_format import PackedExport
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.formats.two_layouts import COMPRESSED_TENSORS, TwoLayoutsExport
from dist_peft.export.verify_formats import ConsumerRequest


class _Called(Exception):
    pass


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.parametrize("other", [False, True])
def test_consumer_by_method(
    name: str, other: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = FORMATS[name]
    assert isinstance(known, TwoLayoutsExport) and isinstance(known, PackedExport)
    assert set(known.by_method) == {name, "compressed-tensors"}
    assert known.consumers == tuple(known.by_method.values())
    method = "compressed-tensors" if other else name
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method}})
    )

    def note(self: object, request: ConsumerRequest) -> None:
        assert (self is COMPRESSED_TENSORS) == other
        raise _Called

    monkeypatch.setattr(type(COMPRESSED_TENSORS), "compute_logits", note)
    request = ConsumerRequest(tmp_path, None, None)  # type: ignore[arg-type]
    with pytest.raises(_Called):
        known.verify_export(None, request)  # type: ignore[arg-type]
