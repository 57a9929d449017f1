from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.adapters.bottleneck.method import BottleneckAdapter
from dist_peft.adapters.classifier_head.method import HeadedAdapter
from dist_peft.adapters.full.method import PartialAdapter
from dist_peft.adapters.fusion.method import FusionAdapter
from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.adapters.method_table import NoAdapter, assemble_adapter, make_adapter
from dist_peft.adapters.qalora.method import QaLoraAdapter
from dist_peft.adapters.virtual_tokens.p_tuning import PTuningAdapter
from dist_peft.adapters.virtual_tokens.prefix_tuning import PrefixAdapter
from dist_peft.adapters.virtual_tokens.prompt_tuning import PromptTuningAdapter
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import (
    BottleneckConfig,
    FullConfig,
    FusionConfig,
    LoraConfig,
    NoAdapterConfig,
    PartialConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QaLoraConfig,
    VirtualTokensConfig,
)
from dist_peft.data.labels import list_class_names
from dist_peft.model.skeleton import build_skeleton
from tests.support.adapters import frozen_model, tiny_llama
from tests.support.tiny_runs import tiny_tree


def test_kinds() -> None:
    lora = make_adapter(LoraConfig(r=3), seed=5, arithmetic=torch.bfloat16)
    assert isinstance(lora, LoraAdapter)
    assert (lora.config.r, lora.seed, lora.arithmetic) == (3, 5, torch.bfloat16)
    qalora = make_adapter(QaLoraConfig(r=3), seed=5, arithmetic=torch.bfloat16)
    assert isinstance(qalora, QaLoraAdapter)
    methods: list[tuple[VirtualTokensConfig, type]] = [
        (PromptConfig(), PromptTuningAdapter),
        (PTuningConfig(), PTuningAdapter),
        (PrefixConfig(), PrefixAdapter),
    ]
    for config, kind in methods:
        virtual = make_adapter(config, seed=5, arithmetic=torch.bfloat16)
        assert type(virtual) is kind
        assert (virtual.config, virtual.position.seed) == (config, 5)
    bottleneck = make_adapter(BottleneckConfig(), seed=5, arithmetic=torch.bfloat16)
    assert isinstance(bottleneck, BottleneckAdapter)
    assert (bottleneck.seed, bottleneck.arithmetic) == (5, torch.bfloat16)
    for section in (FullConfig(), PartialConfig(last_blocks=1)):
        partial = make_adapter(section, seed=5, arithmetic=torch.bfloat16)
        assert isinstance(partial, PartialAdapter)
        assert (partial.config, partial.arithmetic) == (section, torch.bfloat16)
    fused = FusionConfig(adapters=["a", "b"])
    fusion = make_adapter(fused, seed=5, arithmetic=torch.bfloat16)
    assert isinstance(fusion, FusionAdapter)
    assert (fusion.config, fusion.seed, fusion.arithmetic) == (fused, 5, torch.bfloat16)
    none = make_adapter(NoAdapterConfig(), seed=0, arithmetic=torch.float32)
    assert isinstance(none, NoAdapter)


def test_no_adapter_changes_nothing() -> None:
    model, adapter = frozen_model(tiny_llama()), NoAdapter()
    before = [name for name, _ in model.named_modules()]
    adapter.attach_to_model(model)
    adapter.begin_micro_batch(0, torch.tensor([0]))
    adapter.set_init_factors({})
    assert [name for name, _ in model.named_modules()] == before
    assert adapter.list_init_factors() == ()
    assert adapter.get_lr_scale("x.lora_B") == 1.0
    with pytest.raises(RuntimeError, match="nothing to save"):
        adapter.to_public_adapter({}, "base")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("head", ["lm", "classifier"])
def test_head_and_arithmetic(head: str, precision: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"base__compute_dtype": "bfloat16", "train__precision": precision}
    if head == "classifier":
        source = {"path": "x.tsv", "format": "classification", "labels": ["a", "b"]}
        changes |= {"base__head": head, "data__train": [source], "data__eval": []}
    config = parse_config(tiny_tree(tmp_path, **changes))
    skeleton = build_skeleton(config.base, Path(config.base.path), list_class_names(config.data))
    adapter = assemble_adapter(config, skeleton)
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    if head == "classifier":
        assert isinstance(adapter, HeadedAdapter)
        adapter = adapter.trunk
    assert isinstance(adapter, LoraAdapter) and adapter.arithmetic == wanted
    adapter.attach_to_model(skeleton.model)
    assert len(adapter.layers) == 14
