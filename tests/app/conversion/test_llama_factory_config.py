"""A whole LLaMA-Factory file: every value that differs from our defaults is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.conversion.converted_config import convert_config_file
from dist_peft.core.errors import UserError

QLORA = """
### model
model_name_or_path: org/tiny-4b
trust_remote_code: true
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
deepspeed: configs/ds_z3.json
### data
dataset: notes,talks
dataset_dir: sets
template: qwen3
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
val_size: 0.1
### output
output_dir: saves/notes
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
eval_strategy: steps
eval_steps: 500
"""
LEAST = "model_name_or_path: m\ndataset: notes\ndataset_dir: sets\n"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    (tmp_path / "sets").mkdir()
    entries = {
        "notes": {"file_name": "notes.json"},
        "talks": {"file_name": "talks.json", "formatting": "sharegpt"},
    }
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path / "sets"


def _convert(sets: Path, text: str, ranks: int = 1) -> tuple[dict[str, Any], list[str]]:
    file = sets.parent / "a.yaml"
    file.write_text(text)
    _, draft = convert_config_file(file, ranks)
    return draft.build_tree(), [line.split(":")[0] for line in draft.unmatched]


def test_a_whole_file(sets: Path) -> None:
    tree, unmatched = _convert(sets, QLORA, ranks=4)
    assert tree == {
        "base": {"path": "org/tiny-4b", "quant": {"kind": "nf4"}, "compute_dtype": "bfloat16"},
        "adapter": {
            "kind": "lora",
            "r": 8,
            "alpha": 16,
            "dropout": 0,
            "target_modules": ["q_proj", "v_proj"],
        },
        "data": {
            "train": [
                {
                    "path": str(sets / "notes.json"),
                    "name": "notes",
                    "format": "alpaca",
                    "limit": 1000,
                },
                {
                    "path": str(sets / "talks.json"),
                    "name": "talks",
                    "format": "chat",
                    "limit": 1000,
                },
            ],
            "val_split": 0.1,
            "seq_len": 1024,
            "packing": False,
            "too_long": "truncate",
            "workers": 16,
        },
        "engine": {"kind": "zero", "stage": 3},
        "train": {
            "micro_batch": 1,
            "global_batch": 32,
            "lr": 1e-4,
            "seed": 42,
            "epochs": 2,
            "schedule": "cosine",
            "warmup": 0.1,
            "log_every": 10,
            "eval_every": 500,
        },
        "save": {"every": 500, "dir": "saves/notes"},
    }
    assert unmatched == ["trust_remote_code", "template", "ddp_timeout", "overwrite_output_dir"]


def test_defaults_of_llama_factory_are_written(sets: Path) -> None:
    tree, unmatched = _convert(sets, LEAST)
    assert tree["base"] == {"path": "m", "quant": None}
    assert tree["adapter"]["r"] == 8 and tree["adapter"]["alpha"] == 16
    assert tree["adapter"]["target_modules"] == "all-linear"
    assert tree["train"] == {
        "micro_batch": 8,
        "global_batch": 8,
        "lr": 5e-5,
        "seed": 42,
        "epochs": 3,
        "schedule": "linear",
        "warmup": 0,
    }
    assert unmatched == []


@pytest.mark.parametrize(
    ("text", "section", "expected"),
    [
        ("quantization_bit: 8", "base", {"quant": {"kind": "int", "bits": 8}}),
        (
            "quantization_bit: 3\nquantization_method: hqq",
            "base",
            {"quant": {"kind": "int", "bits": 3, "solver": "hqq"}},
        ),
        (
            "quantization_bit: 4\ndouble_quantization: false",
            "base",
            {"quant": {"kind": "nf4", "double_quant": False}},
        ),
        ("flash_attn: fa2", "base", {"attention": "flash_attention_2"}),
        ("finetuning_type: full", "adapter", {"kind": "full"}),
        (
            "finetuning_type: freeze\nfreeze_trainable_layers: 3",
            "adapter",
            {"kind": "partial", "last_blocks": 3},
        ),
        ("use_dora: true\nuse_rslora: true", "adapter", {"use_dora": True, "use_rslora": True}),
        ("pissa_init: true", "adapter", {"init": "pissa", "init_iterations": 16}),
        ("pissa_init: true\npissa_iter: -1", "adapter", {"init": "pissa"}),
        ("loraplus_lr_ratio: 16", "adapter", {"lr_ratio": 16}),
        ("neat_packing: true", "data", {"packing": True}),
        ("stage: pt", "data", {"packing": True, "too_long": "split"}),
        ("train_on_prompt: true", "data", {"loss_on": "all"}),
        ("disable_shuffling: true", "train", {"shuffle": False}),
    ],
)
def test_options(sets: Path, text: str, section: str, expected: dict[str, Any]) -> None:
    tree, _ = _convert(sets, LEAST + text)
    assert {key: tree[section].get(key) for key in expected} == expected


def test_mixing_and_held_out_sets(sets: Path) -> None:
    text = LEAST.replace("dataset: notes", "dataset: [notes, talks]")
    text += "mix_strategy: interleave_over\ninterleave_probs: 0.7, 0.3\neval_dataset: talks"
    data = _convert(sets, text)[0]["data"]
    assert data["mixing"] == "weights" and [s["weight"] for s in data["train"]] == [0.7, 0.3]
    assert [source["name"] for source in data["eval"]] == ["talks"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "stage: dpo", "stage: dpo trains on preferences or rewards"),
        (LEAST + "finetuning_type: oft", "finetuning_type: oft has no counterpart"),
        (LEAST + "finetuning_type: freeze\nfreeze_trainable_layers: -2", "trains the first blocks"),
        ("model_name_or_path: m", "has no dataset"),
    ],
)
def test_other_kinds_of_training(sets: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _convert(sets, text)
