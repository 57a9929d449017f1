"""The directory of a base with GPTQ's factors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_peft.app.quantized_base import calibrate_base, must_solve_base
from dist_peft.compress.calibrated_base import FactorWriter
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.gptq_factors import has_gptq_factors
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.calibrated_codec import CalibratedCodec
from dist_peft.quant.gptq import HessianFactor
from tests.support.prequantized_models import linears
from tests.support.quantized_runs import make_gptq_tree, write_quantized


def test_linears_of_the_base_are_encoded_as_a_solved_base_is(tmp_path: Path) -> None:
    """The tensors are the base's, and rows encoded alone those of ``dist-peft quantize``."""
    tree = make_gptq_tree(tmp_path)
    solved = write_quantized(World(), tree, tmp_path / "solved")
    out, config = tmp_path / "out", parse_config(tree)
    calibrate_base(config, out, World(), torch.device("cpu"))
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    skeleton = build_skeleton(config.base, out)
    found = linears(skeleton)
    assert len(found) == sum(name.endswith(".packed") for name in solved)
    for name, linear in found.items():
        assert isinstance(linear.codec, CalibratedCodec)
        packed = linear.codec.quantize_to_packed(after[name])
        assert torch.equal(packed, solved[name.replace(".weight", ".packed")])
    assert read_quantization_origin(out)["base"] == str(tmp_path / "base")
    given = config.model_copy(update={"base": config.base.model_copy(update={"path": str(out)})})
    assert not must_solve_base(given, tmp_path / "none")
    assert has_gptq_factors(out) and not has_gptq_factors(tmp_path / "solved")
    other = QuantConfig.model_validate({**tree["base"]["quant"], "group_size": 8})
    with pytest.raises(UserError, match=r"in groups of 16, and base\.quant has 3 in groups of 8"):
        build_skeleton(config.base.model_copy(update={"quant": other}), out)
    about = out / "gptq_factors" / "about.json"
    known = json.loads(about.read_text())
    del known["files"][next(iter(found))]
    about.write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"about\.json names no file for model\.layers\.0"):
        build_skeleton(config.base, out)


def test_linears_of_one_input_share_a_file(tmp_path: Path) -> None:
    writer = FactorWriter(tmp_path)
    factor = HessianFactor(torch.arange(8), torch.eye(8))
    writer.write_factor(["q", "k"], factor)
    writer.write_factor(["o"], factor)
    assert writer.files == {"q": "0.safetensors", "k": "0.safetensors", "o": "1.safetensors"}
    assert len(list(tmp_path.glob("gptq_factors/*.safetensors"))) == 2
