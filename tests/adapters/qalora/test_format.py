"""Forms of a QA-LoRA adapter, each computed by real PEFT."""

import copy
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import peft.tuners.lora.gptq as peft_gptq
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_peft.adapters.directory import (
    open_adapter_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.lora.tensors import parse_lora_tensors
from dist_peft.adapters.qalora.format import expand_to_plain_lora, to_pooled_peft
from dist_peft.core.config.run import QaLoraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.frozen_linear import FrozenLinear
from tests.support.adapters import (
    adapted,
    disturb,
    ids,
    int_codec,
    save,
    tiny_llama,
)

Q = "model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, Any] = {"r": 4, "alpha": 6, "rank_pattern": {"k_proj": 2}, "dropout": 0.1}


class GptqLinear(nn.Module):
    """Stands for a linear of gptqmodel: PEFT's QA-LoRA asks for nothing but its class."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.qweight = linear.weight  # PEFT hands it on, and looks up its device

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets PEFT find the stand-in where gptqmodel would be."""
    module = types.ModuleType("gptqmodel.nn_modules.qlinear")
    module.BaseQuantLinear = GptqLinear  # type: ignore[attr-defined]
    for name in ("gptqmodel", "gptqmodel.nn_modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(peft_gptq, "is_gptqmodel_available", lambda: True)


def gptq_model(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, GptqLinear(module))
    return model


def trained(directory: Path, pool_size: int | None = None) -> tuple[nn.Module, nn.Module]:
    """(the decoded base as a plain model, the trained model); ours is in ``directory``."""
    original = tiny_llama(bias=True)
    settings = {**SETTINGS, "pool_size": pool_size}
    if pool_size:
        settings["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    model, adapter = adapted(original, int_codec(), method=QaLoraConfig, **settings)
    disturb(model)
    decoded = original.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            rows = module.codec.dequantize_rows(module.packed, module.in_features, torch.float32)
            decoded[f"{path.removesuffix('.base')}.weight"] = rows
    original.load_state_dict(decoded)
    save(model, adapter, directory)
    return original, model.eval()


def computed_by_peft(base: nn.Module, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys, ignored settings
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # the stand-in
        return PeftModel.from_pretrained(base, directory).eval()


def assert_same(peft_model: nn.Module, model: nn.Module, base: nn.Module) -> None:
    with torch.no_grad():
        theirs, ours, bare = (m(ids()).logits for m in (peft_model, model, base))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 0.05
    error = (theirs - ours).norm() / (ours - bare).norm()
    print(f"error over the adapter's effect: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("pool_size", [None, 32])
def test_peft_computes_the_expanded_form(pool_size: int | None, tmp_path: Path) -> None:
    base, model = trained(tmp_path / "ours", pool_size)
    write_adapter_directory(
        tmp_path / "lora", expand_to_plain_lora(read_adapter_directory(tmp_path / "ours")), {}
    )
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not any("qalora" in key for key in config) and config["peft_type"] == "LORA"
    assert_same(computed_by_peft(copy.deepcopy(base), tmp_path / "lora"), model, base)


@pytest.mark.usefixtures("gptq")
@pytest.mark.parametrize("pool_size", [None, 32])
def test_peft_computes_its_own_form(pool_size: int | None, tmp_path: Path) -> None:
    base, model = trained(tmp_path / "ours", pool_size)
    write_adapter_directory(
        tmp_path / "peft", to_pooled_peft(read_adapter_directory(tmp_path / "ours")), {}
    )
    adapted_base = computed_by_peft(gptq_model(copy.deepcopy(base)), tmp_path / "peft")
    assert "use_qalora" in (tmp_path / "peft" / "adapter_config.json").read_text()
    layer = adapted_base.get_submodule(f"base_model.model.{Q}")
    assert type(layer.lora_variant["default"]).__name__ == "QALoraLinearVariant"
    assert_same(adapted_base, model, base)


@pytest.mark.usefixtures("gptq")
def test_pefts_own_adapter_is_read(tmp_path: Path) -> None:
    """Trained by PEFT, merged by us."""
    base = tiny_llama()
    config = PeftLoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        use_qalora=True,
        qalora_group_size=8,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(gptq_model(copy.deepcopy(base)), config)
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    merger = open_adapter_merger(tmp_path)
    merged = base.state_dict()
    for name, weight in merged.items():
        if merger.changes_weight(name):
            span = Span(0, weight.shape[0])
            merged[name] = merger.merge_weight_rows(name, weight, span, "original")
    assert merger.list_unused_tensors() == []
    plain = tiny_llama()
    plain.load_state_dict(merged)
    assert_same(peft_model.eval(), plain.eval(), base)


def test_official_adapter_is_read(tmp_path: Path) -> None:
    """Mean pooling, and a configuration that does not say so until its user adds it."""
    groups, size = 4, 8
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, groups, generator=generator), torch.randn(32, 4, generator=generator)
    names = {f"base_model.model.{Q}.lora_{f}.weight": v for f, v in (("A", A), ("B", B))}
    save_file(names, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    config |= {"use_qalora": True, "qalora_group_size": size, "qalora_pool": "mean"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    x = torch.randn(5, 32, generator=generator)
    # the forward of the authors' peft_utils.py: lora_B(lora_A(AvgPool1d(x))) * scale
    expected = nn.AvgPool1d(size)(x) @ A.T @ B.T * (16 / 4)
    delta = open_adapter_merger(tmp_path).compute_delta_rows(f"{Q}.weight", Span(0, 32))
    torch.testing.assert_close(x @ delta.T, expected, rtol=1e-5, atol=1e-5)
    # the zeros of its merge.py: -= (B @ A).t() * scale / group_size / scales
    change = parse_lora_tensors(read_adapter_directory(tmp_path))[Q]
    torch.testing.assert_close(change.scaling * change.B @ change.A, 4 * B @ A / size)


def test_forms_are_exact_inverses(tmp_path: Path) -> None:
    trained(tmp_path / "ours")
    ours = read_adapter_directory(tmp_path / "ours")
    theirs = to_pooled_peft(ours)
    assert to_pooled_peft(theirs) is theirs
    for path, module in parse_lora_tensors(theirs).items():
        own = parse_lora_tensors(ours)[path]
        assert torch.equal(module.A, own.A) and (module.pool, own.pool) == (16, 16)
        torch.testing.assert_close(module.B, own.B, rtol=1e-6, atol=0)
    wide = expand_to_plain_lora(theirs)
    assert expand_to_plain_lora(wide) is wide and to_pooled_peft(wide) is wide
    for path, module in parse_lora_tensors(wide).items():
        assert torch.equal(module.A, parse_lora_tensors(ours)[path].A.repeat_interleave(16, 1))


def test_our_form_is_not_mistaken_for_pefts(tmp_path: Path) -> None:
    base, _ = trained(tmp_path)
    with pytest.raises((KeyError, ValueError), match="QALORA"):
        PeftModel.from_pretrained(base, tmp_path)


def test_plain_lora_that_peft_calls_qalora(tmp_path: Path) -> None:
    """PEFT ignores the switch on any linear but gptqmodel's, and says nothing."""
    config = PeftLoraConfig(
        r=4, target_modules=["q_proj"], use_qalora=True, qalora_group_size=8, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    A = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_A.weight"]
    assert A.shape == (4, 32)  # should it be (4, 4) one day, this trap is gone
    with pytest.raises(UserError, match=r"set use_qalora to false in its adapter_config\.json"):
        open_adapter_merger(tmp_path).merge_weight_rows(
            f"{Q}.weight", torch.zeros(32, 32), Span(0, 32), "original"
        )
