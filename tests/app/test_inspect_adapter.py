"""Adapter directories of every kind: this project's own, PEFT's, AdapterHub's."""

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as tf
from safetensors.torch import load_file

from dist_peft.app.commands.inspect import describe_path
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from tests.support.story_runs import train
from tests.support.tiny_runs import save_base, tiny_tree

INT4 = {"kind": "int", "bits": 4, "group_size": 8}
OURS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"r": 4, "use_dora": True}, "LORA r=4 alpha=32 rslora=False dora=True"),
    "qalora": ({"kind": "qalora", "r": 4}, "QALORA r=4 alpha=32 rslora=False dora=False"),
    "bottleneck": ({"kind": "bottleneck"}, "bottleneck placement=pfeiffer reduction_factor=16.0 "),
    "prefix": ({"kind": "prefix", "num_virtual_tokens": 4}, "PREFIX_TUNING virtual_tokens=4"),
    "ptuning": ({"kind": "ptuning", "num_virtual_tokens": 4}, "P_TUNING virtual_tokens=4"),
    "prompt": ({"kind": "prompt", "num_virtual_tokens": 4}, "PROMPT_TUNING virtual_tokens=4"),
    "full": ({"kind": "full"}, "full fine-tuning"),
    "partial": ({"kind": "partial", "last_blocks": 1}, "partial fine-tuning"),
}


def counted(file: Path) -> str:
    tensors = load_file(file)
    return f"{sum(t.numel() for t in tensors.values()):,} in {len(tensors)} tensors"


def described(path: Path) -> str:
    return "\n".join(describe_path(path)) + "\n"


@pytest.mark.parametrize("kind", OURS)
def test_of_this_project(kind: str, tmp_path: Path) -> None:
    adapter, method = OURS[kind]
    quant = INT4 if kind == "qalora" else None
    tree = tiny_tree(
        tmp_path, adapter=adapter, train__steps=1, data__eval=[], base__quant=quant, save__every=0
    )
    assert train(World(), tree) == 0
    close_log()
    directory = tmp_path / "run" / "adapter"
    text = described(directory)
    assert f"  method       {method}" in text and "not read" not in text
    assert f"  parameters   {counted(next(directory.glob('*.safetensors')))}\n" in text
    assert text.count(f"  base         {tmp_path / 'base'}\n") == 1
    assert "  base_fingerprint " in text
    assert ", hashes of " in text and "'tensors'" not in text
    assert ("pooling      sum of 8 inputs" in text) == (kind == "qalora")


def ia3() -> peft.PeftConfig:
    return peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])


PEFTS: dict[str, tuple[Callable[[], peft.PeftConfig], tuple[str, ...]]] = {
    "lora, a regular expression": (
        lambda: peft.LoraConfig(r=2, target_modules=r".*\.q_proj"),
        ("LORA r=2 alpha=8 rslora=False dora=False\n", "targets      .*\\.q_proj\n"),
    ),
    "lora, many targets": (
        lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
        ("model.layers.0.mlp.down_proj, ", " and 2 more\n"),
    ),
    "lora and whole modules": (
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
        ("targets      q_proj\n", "also whole   norm\n"),
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        ("PROMPT_TUNING virtual_tokens=3\n",),
    ),
    "ia3": (
        ia3,
        ("method       IA3 feedforward_modules=up_proj\n", "targets      k_proj, up_proj\n"),
    ),
    "loha": (
        lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]),
        ("method       LOHA r=2 alpha=4\n", "targets      q_proj\n"),
    ),
    "vera": (
        lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
        ("method       VERA r=2 projections=saved\n", "targets      q_proj\n"),
    ),
    "boft": (
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
        ("method       BOFT", "not read     "),
    ),
    "lora with biases": (
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        ("method       LORA r=2", "not read     the adapter was trained with bias"),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("inspect adapters") / "base")


@pytest.mark.parametrize("case", PEFTS)
def test_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    make, wanted = PEFTS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.AutoModelForCausalLM.from_pretrained(base)
        peft.get_peft_model(model, make()).save_pretrained(tmp_path)
    text = described(tmp_path)
    assert all(part in text for part in wanted), text
    assert counted(tmp_path / "adapter_model.safetensors") in text
    assert f"base         {base}\n" in text
    if case in ("lora, many targets", "prompt", "ia3", "loha", "vera"):
        assert "not read" not in text


WRITES = """
import sys, adapters, torch, transformers as tf
base, out = sys.argv[1:]
model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
adapters.init(model)
for name in ("seq_bn", "lora", "ia3", "seq_bn_inv"):
    model.add_adapter(name, config=name)
    model.save_adapter(f"{out}/{name}", name, use_safetensors=True)
model.save_adapter(f"{out}/pickle", "seq_bn", use_safetensors=False)
"""


@pytest.mark.e2e
def test_of_adapterhub(base: Path, tmp_path: Path) -> None:
    python = os.environ.get("DIST_PEFT_ADAPTERS_PYTHON")
    if python is None:
        pytest.skip("DIST_PEFT_ADAPTERS_PYTHON names no Python with adapters 1.3")
    words = [python, "-c", WRITES, str(base), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name.name: described(name) for name in tmp_path.iterdir()}
    assert "bottleneck placement=pfeiffer" in found["seq_bn"]
    assert "not read" not in found["seq_bn"]
    assert "AdapterHub's lora composition_mode=add\n" in found["lora"]
    assert "AdapterHub's lora composition_mode=scale\n" in found["ia3"]
    assert "only bottlenecks are read" in found["lora"]
    assert "AdapterHub's bottleneck of another form\n" in found["seq_bn_inv"]
    assert "inv_adapter is 'nice'" in found["seq_bn_inv"]
    assert "in pytorch_adapter.bin, a pickle, which is not opened" in found["pickle"]
    assert "not read     " in found["pickle"]
    assert all(f"base         {base}\n" in text for text in found.values())


def test_unknown_method_without_its_library(tmp_path: Path) -> None:
    """AdapterHub's form of something else, and a directory whose tensors are gone."""
    config = {"config": {"architecture": "prefix_tuning"}, "model_name": "x", "version": "1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter\.safetensors does not exist"):
        describe_path(tmp_path)
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"x")
    assert "AdapterHub's prefix_tuning\n" in described(tmp_path)
