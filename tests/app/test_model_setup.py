import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.model_setup import build_model, load_weights, replace_labels
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from tests.support.classification_runs import classifying_tree, save_classifier_base
from tests.support.fusion_runs import NAMES, fusion_tree
from tests.support.tiny_runs import save_config, tiny_tree

IDS = torch.tensor([[1, 5, 9, 80]])


def test_unquantized_model_with_a_fresh_adapter_is_the_base(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path))
    built = load_weights(build_model(resolve_config(config)), World(), torch.device("cpu"))
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        found = built.model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    size = sum(p.numel() * 4 for p in plain.parameters())
    assert built.bytes_read == size
    assert all(not p.is_meta for p in built.model.parameters())


def test_base_id_depends_on_files_and_storage_only(tmp_path: Path) -> None:
    def base_id(**changes: object) -> str:
        tree = {**tiny, "base": {**tiny["base"], **changes}}
        return build_model(resolve_config(parse_config(tree))).base_id

    tiny = tiny_tree(tmp_path)
    first = base_id()
    assert base_id(attention="eager") == first
    others = [base_id(quant={"kind": "nf4"}), base_id(compute_dtype="bfloat16")]
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    others.append(base_id())
    assert len({first, *others}) == 4


def test_remote_code_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_peft"):
        build_model(resolve_config(parse_config(tiny_tree(tmp_path))))
        assert "trust_remote_code" not in caplog.text
        build_model(resolve_config(parse_config(tiny_tree(tmp_path, base__trust_remote_code=True))))
    assert f"code shipped with {tmp_path / 'base'} will run" in caplog.text


def test_fusing_adapters_of_another_base_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base of the same shape, which no check of shapes tells apart."""
    config = parse_config(fusion_tree(tmp_path))
    with caplog.at_level(logging.WARNING, "dist_peft"):
        build_model(resolve_config(config))
    assert "adapter.adapters" not in caplog.text
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"tasks/{NAMES[0]}/adapter was trained on another base"):
        build_model(resolve_config(config))


def test_classes_can_be_called_otherwise(tmp_path: Path) -> None:
    """As a model that was built with these labels; nothing else changes, nor does the first."""
    tree = classifying_tree(tmp_path, save_classifier_base(tmp_path / "base", "bert"))
    config = parse_config(tree)
    built = load_weights(build_model(resolve_config(config)), World(), torch.device("cpu"))
    before = built.setup.base_id
    renamed = replace_labels(built, ["0", "1"])
    tree["data"]["train"][0]["labels"] = ["0", "1"]
    tree["data"]["eval"] = []
    again = build_model(resolve_config(parse_config(tree)))
    assert renamed.setup.base_id == again.base_id != before
    assert built.setup.base_id == before
    assert replace_labels(renamed, ["no", "yes"]).setup.base_id == before
    public = renamed.setup.adapter.to_public_adapter(renamed.gather_adapter(), "base")
    assert public.head is not None and public.head.labels == ("0", "1")
    assert renamed.model is built.model and renamed.engine is built.engine


def test_a_language_model_has_no_classes_to_call(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path))
    built = load_weights(build_model(resolve_config(config)), World(), torch.device("cpu"))
    assert replace_labels(built, []) is built


def test_a_rank_that_writes_nothing_keeps_no_gathered_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(tiny_tree(tmp_path))
    built = load_weights(build_model(resolve_config(config)), World(), torch.device("cpu"))
    gathered = list[weakref.ref[torch.Tensor]]()
    live = list[int]()

    def gather(parameter: torch.Tensor) -> torch.Tensor:
        live.append(sum(reference() is not None for reference in gathered))
        whole = parameter.detach().clone()
        gathered.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(built.engine, "gather_parameter", gather)
    assert built.gather_adapter(keep=False) == {}
    assert len(gathered) == len(built.adapter_names) > 2 and max(live) <= 1
    assert set(built.gather_adapter()) == set(built.adapter_names)


def test_checkpoint_with_values_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``eval --run`` of a state with a NaN names it, instead of printing a loss of NaN."""
    save = CheckpointManager.save_checkpoint

    def save_damaged(self: CheckpointManager, state: Any, *rest: Any, **options: Any) -> Path:
        name = next(n for n in state if n.startswith("param/") and n.endswith("lora_B"))
        damaged = state[name].clone()
        damaged.view(-1)[0] = float("nan")
        return save(self, {**state, name: damaged}, *rest, **options)

    monkeypatch.setattr(CheckpointManager, "save_checkpoint", save_damaged)
    tree = tiny_tree(tmp_path, train={"global_batch": 2, "steps": 1, "device": "cpu"})
    assert train_from_config(parse_config(tree), World()) == 0
    argv = ["eval", "--config", str(save_config(tmp_path, tree)), "--run", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert "lora_B holds nan" in capsys.readouterr().err
