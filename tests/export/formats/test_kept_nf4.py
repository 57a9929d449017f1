"""An NF4 base's own codes, read by bitsandbytes, with the adapter apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.export.formats.kept_nf4 import KeptNf4Packer
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.verify import Probe
from dist_peft.quant.nf4 import Nf4Codec
from tests.support.export_runs import finished_run, fork_consumers
from tests.support.tiny_runs import tiny_tree

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("quant", "adapter", "tied"),
    [
        ({"kind": "nf4"}, {}, False),
        ({"kind": "nf4", "group_size": 192, "double_quant": False}, {"use_rslora": True}, False),
        ({"kind": "nf4", "group_size": 32}, {"init": "pissa"}, False),
        ({"kind": "nf4"}, {"init": "loftq"}, False),
        ({"kind": "nf4"}, {"init": "pissa", "embeddings": True}, True),
        ({"kind": "nf4"}, {"init": "pissa", "target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=[
        "lora",
        "groups of 192",
        "pissa, groups of 32",
        "loftq",
        "pissa, tied embedding",
        "pissa, head",
    ],
)
def test_consumer_computes_the_trained_function(
    tmp_path: Path,
    quant: dict[str, Any],
    adapter: dict[str, Any],
    tied: bool,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if adapter:
        fork_consumers(monkeypatch)
    run, out = finished_run(tmp_path, quant, adapter, tied=tied), tmp_path / "out"
    argv = ["export", "--run", str(run), "--format", "bnb-nf4", "--keep-adapter", "--out", str(out)]
    assert cli.main(argv) == 0, capsys.readouterr().err
    close_log()
    if "peft" not in capsys.readouterr().err:
        pytest.fail("PEFT did not load the adapter")
    # the weights that bitsandbytes decodes are training's, bit for bit
    stored = load_file(out / "model.safetensors")
    base = BaseConfig(
        path=str(tmp_path / "base"), quant=QuantConfig(**quant), compute_dtype="float32"
    )
    with open_merged_weights(base, tmp_path / "base", run / "adapter", "base") as walk:
        weights = [w for w in walk.weights if walk.is_packable(w)]
        assert len(weights) == 14
        for weight in weights:
            span = next(iter(walk.iterate_spans(weight)))
            assert isinstance(weight.codec, Nf4Codec)
            packed = walk.read_packed_rows(weight, span)
            wanted = weight.codec.dequantize_rows(packed, weight.num_columns, torch.float32)
            parts = {k: v for k, v in stored.items() if k.startswith(f"{weight.name}.")}
            state = bnb.functional.QuantState.from_dict(
                {k.removeprefix(f"{weight.name}."): v for k, v in parts.items()},
                torch.device("cpu"),
            )
            found = bnb.functional.dequantize_4bit(stored[weight.name], state)
            assert torch.equal(found, wanted), weight.name
    # and plain PEFT, which finds the base by the adapter's own configuration
    named = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(out) and named["r"] == 5
    model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu")
    adapted = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    probe = Probe.load_probe(run / "probe.safetensors")
    with torch.no_grad():
        logits = adapted(input_ids=probe.input_ids).logits
    change = (probe.trained - probe.before).square().mean().sqrt()
    assert (logits - probe.trained).square().mean().sqrt() < 0.02 * change


def test_refused_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    """The tiny model's in_features of 16 are no multiple of 32; an integer base has other ways."""
    for number, (quant, words) in enumerate(
        [
            ({"kind": "nf4"}, "which blocks of 64 do not divide"),
            ({"kind": "nf4", "group_size": 8}, "in groups of 8 weights, and bitsandbytes reads"),
            ({"kind": "int", "group_size": 8}, "gptq and compressed-tensors keep the codes"),
            (None, "on a base that was not quantized, peft is the trained adapter"),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        tree = tiny_tree(directory, base__quant=quant, train__steps=1, data__eval=[])
        assert train_from_config(parse_config(tree), World()) == 0
        close_log()
        out = directory / "out"
        argv = ["export", "--run", str(directory / "run"), "--out", str(out)]
        assert cli.main([*argv, "--format", "bnb-nf4", "--keep-adapter"]) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
        close_log()


def test_block_size() -> None:
    assert [KeptNf4Packer(g, torch.float32).block for g in (64, 128, 192, 32, 96)] == [
        64,
        64,
        64,
        32,
        32,
    ]
    with pytest.raises(UserError, match="groups of 48"):
        KeptNf4Packer(48, torch.float32)
