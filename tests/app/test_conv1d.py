"""GPT-2, whose weights are stored transposed: runs, merges and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from dist_peft.adapters.method_table import make_adapter
from dist_peft.app import cli
from dist_peft.core.config.run import AdaLoraConfig, BaseConfig, Ia3Config, VeraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader
from tests.support.adapters import disturb, save
from tests.support.loaded_models import IDS, logits
from tests.support.pruning_runs import write_pruned
from tests.support.quantized_runs import write_quantized
from tests.support.tiny_models import TRANSPOSED, save_model
from tests.support.tiny_runs import GPTQ, save_words, tiny_tree, train

pytestmark = pytest.mark.e2e
LORA = {"kind": "lora", "r": 4, "alpha": 8}
TARGETS: dict[str, Any] = {
    "target_modules": ["c_attn", "mlp.c_proj"],
    "feedforward_modules": ["mlp.c_proj"],
}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "other").mkdir()
    save_model(TRANSPOSED["gpt2"], tmp_path / "base")
    save_words(tmp_path / "base")
    base = tmp_path / "base"
    changed = tiny_tree(tmp_path / "other", save__every=3)
    save = {**changed["save"], "dir": str(tmp_path / "run")}
    return {**changed, "base": {**changed["base"], "path": str(base), "quant": {}}, "save": save}


@pytest.mark.parametrize(
    "adapter",
    [{**LORA, "use_dora": True}, {"kind": "full"}],
    ids=["dora", "full"],
)
def test_merge_is_the_trained_model(
    adapter: dict[str, Any], tree: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    """As transformers loads it, and as PEFT computes."""
    tree["adapter"] = adapter
    if adapter["kind"] == "full":
        tree["base"]["quant"] = None
    assert train(tree) == 0
    words = ["--run", str(tmp_path / "run"), "--dtype", "float32", "--json"]
    decoded = ["--base", "decoded", "--out", str(tmp_path / "decoded")]
    assert cli.main(["merge", *words, *decoded]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["relative"] < 1e-5
    if adapter["kind"] == "full":
        return
    assert cli.main(["merge", *words, "--out", str(tmp_path / "merged")]) in (0, 1)
    packed = ["export", "--run", str(tmp_path / "run"), "--format", "fp8"]
    assert cli.main([*packed, "--out", str(tmp_path / "fp8")]) == 2
    assert "weights of the base are stored transposed" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
    close_log()
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings(record=True) as warned:
        theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert not [w for w in warned if "fan_in_fan_out" in str(w.message)]
    torch.testing.assert_close(
        logits(theirs, input_ids=IDS), logits(merged, input_ids=IDS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "config", [AdaLoraConfig(tinit=0, tfinal=0), Ia3Config(**TARGETS), VeraConfig(r=8)], ids=str
)
def test_peft_applies_it_to_transposed_weights(config: Any, tmp_path: Path) -> None:
    original = save_model(TRANSPOSED["gpt2"], tmp_path / "base")
    skeleton = build_skeleton(
        BaseConfig(path="unused", quant=None, compute_dtype="float32"), tmp_path / "base"
    )
    adapter = make_adapter(config, seed=0, arithmetic=torch.float32)
    adapter.attach_to_model(skeleton.model)
    engine = SingleEngine(torch.device("cpu"))
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, torch.device("cpu"))
    disturb(skeleton.model)
    with warnings.catch_warnings(record=True) as warned:
        theirs = PeftModel.from_pretrained(
            original, save(skeleton.model, adapter, tmp_path / "adapter")
        ).eval()
    assert not [w for w in warned if "fan_in_fan_out" in str(w.message)]
    mine = logits(skeleton.model, input_ids=IDS)
    with theirs.disable_adapter():
        assert not torch.allclose(mine, logits(theirs, input_ids=IDS), rtol=1e-2)
    torch.testing.assert_close(logits(theirs, input_ids=IDS), mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr", "qalora"])
def test_other_methods_are_refused(kind: str, tree: dict[str, Any]) -> None:
    tree["adapter"] = {"kind": kind, "target_modules": ["c_attn", "c_fc"]}
    if kind == "qalora":
        tree["base"]["quant"] = {"kind": "int", "group_size": 32}
    with pytest.raises(UserError, match=f"{kind} is not for weights stored transposed"):
        train(tree)
    close_log()


def test_packed_forms_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "o"
    tree["base"]["quant"] = {**GPTQ}
    with pytest.raises(UserError, match="not quantized in advance: weights of the base are stored"):
        write_quantized(World(), tree, out)
    tree["base"]["quant"] = None
    with pytest.raises(UserError, match="is not pruned: weights of the base are stored"):
        write_pruned(World(), tree, out, "magnitude", "0.5")
    assert not out.exists()
