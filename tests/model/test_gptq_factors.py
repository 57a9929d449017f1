"""Which bases have factors of GPTQ; whole ones are in ``tests/compress/test_calibrated_base``."""

from pathlib import Path

import torch
from torch import nn

from dist_peft.core.config.quantization import QuantConfig
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.gptq_factors import has_gptq_factors, read_factor_origin, use_gptq_factors
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import RawCodec


def test_factors_change_codecs_of_solver_gptq_alone(tmp_path: Path) -> None:
    packed = FrozenLinear(16, 4, AffineCodec(4, 16), False, torch.float32, "some.weight", "meta")
    raw = FrozenLinear(16, 4, RawCodec(), False, torch.float32, "raw.weight", "meta")
    model = nn.ModuleList([packed, raw])
    gptq = QuantConfig(kind="int", group_size=16, solver="gptq")
    use_gptq_factors(model, gptq, tmp_path)  # none there: the base is not calibrated yet
    assert not has_gptq_factors(tmp_path) and read_factor_origin(tmp_path) == {}
    assert packed.codec == AffineCodec(4, 16)
    (tmp_path / "gptq_factors").mkdir()
    (tmp_path / "gptq_factors" / "about.json").write_text(
        '{"bits": 4, "group_size": 16, "files": {"some.weight": "0.safetensors"}, "made_from": 1}'
    )
    for other in (None, QuantConfig(kind="int", group_size=16)):
        use_gptq_factors(model, other, tmp_path)
        assert packed.codec == AffineCodec(4, 16)
    use_gptq_factors(model, gptq, tmp_path)
    assert packed.codec != AffineCodec(4, 16) and packed.codec.name == "int4"
    assert raw.codec == RawCodec()
    assert has_gptq_factors(tmp_path) and read_factor_origin(tmp_path) == {}
