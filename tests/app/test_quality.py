"""What quantizing the frozen base costs, on real weights and real text."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.story_runs import run_config


def held_out_loss(shared_data: Path, tmp_path: Path, quant: dict[str, Any] | None) -> float:
    """After 40 steps of LoRA on GSM8K solutions, which stories260K has never seen."""
    gsm8k = shared_data / "gsm8k"
    columns = {"prompt": "question", "completion": "answer"}
    data = {
        "train": [{"path": str(gsm8k / "train.jsonl"), "columns": columns, "limit": 160}],
        "eval": [{"path": str(gsm8k / "test.jsonl"), "columns": columns, "limit": 30}],
        "seq_len": 512,
        "too_long": "drop",
        "cache_dir": str(tmp_path / "cache"),
    }
    name = "none" if quant is None else quant["kind"]
    save = {"dir": str(tmp_path / name), "every": 0}
    tree = run_config(shared_data, tmp_path, data=data, save=save, base__quant=quant)
    tree["adapter"] = {"kind": "lora", "r": 8, "alpha": 16}
    tree["engine"] = {"activation_checkpointing": False}
    del tree["train"]["eps"]  # as users train
    tree["train"] |= {"steps": 40, "global_batch": 2, "lr": 1e-2}
    assert train_from_config(parse_config(tree), World()) == 0
    records = read_metrics(tmp_path / name / "metrics.jsonl")
    before, after = records[0].eval_loss_before, records[-1].eval_loss
    assert before is not None
    assert after is not None
    assert after < 0.8 * before, f"{name}: held-out loss {before:.3f} -> {after:.3f}"
    return after


@pytest.mark.e2e
@pytest.mark.data
def test_qlora_is_within_two_percent_of_lora(shared_data: Path, tmp_path: Path) -> None:
    lora = held_out_loss(shared_data, tmp_path, None)
    qlora = held_out_loss(shared_data, tmp_path, {"kind": "nf4"})
    print(f"held-out loss: LoRA {lora:.4f}, QLoRA {qlora:.4f}, ratio {qlora / lora:.4f}")
    assert qlora <= 1.02 * lora
