"""Integer zeros that GPTQ and compressed-tensors cannot hold."""

from pathlib import Path

import pytest

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.registry import export_model
from tests.support.export_runs import make_run


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_float_zeros_are_refused(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=4, group_size=32, solver="hqq"))
    with pytest.raises(UserError, match=r"zeros are fractions \(such as .* hqq .* choose mlx"):
        export_model(name, run.job(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    export_model(name, run.job(tmp_path / "merged", merge=True, lossy=True))  # quantized anew
