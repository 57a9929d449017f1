"""A whole axolotl file: every value that differs from our defaults is written."""

from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.conversion.converted_config import convert_config_file
from dist_peft.core.errors import UserError

QLORA = """
base_model: org/tiny-8b
model_type: LlamaForCausalLM
load_in_4bit: true
load_in_8bit: false
strict: false
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
datasets:
  - {path: notes/train.jsonl, type: alpaca}
test_datasets:
  - {path: notes/test.jsonl, type: alpaca}
chat_template: llama3
output_dir: ./out/notes
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
logging_steps: 1
warmup_steps: 10
eval_steps: 50
save_steps: 100
early_stopping_patience: 3
saves_per_epoch:
weight_decay: 0.0
wandb_project: notes
special_tokens: {pad_token: "<pad>"}
"""
QLORA_TREE = {
    "base": {
        "path": "org/tiny-8b",
        "quant": {"kind": "nf4"},
        "attention": "flash_attention_2",
        "compute_dtype": "bfloat16",
    },
    "adapter": {
        "kind": "lora",
        "r": 32,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": "all-linear",
    },
    "data": {
        "train": [{"path": "notes/train.jsonl", "format": "alpaca"}],
        "eval": [{"path": "notes/test.jsonl", "format": "alpaca"}],
        "seq_len": 4096,
        "packing": True,
        "too_long": "drop",
    },
    "engine": {"activation_checkpointing": True},
    "train": {
        "micro_batch": 2,
        "global_batch": 64,
        "lr": 2e-4,
        "optimizer": "paged_adamw8bit",
        "weight_decay": 0,
        "seed": 42,
        "epochs": 4,
        "schedule": "cosine",
        "warmup": 10,
        "log_every": 1,
        "eval_every": 50,
        "early_stop": 3,
    },
    "save": {"dir": "./out/notes", "every": 100, "track": ["wandb"]},
}
LEAST = "base_model: m\ndatasets: [{path: a.jsonl}]\nlearning_rate: 1e-4\n"


def _convert(tmp_path: Path, text: str, ranks: int = 1) -> tuple[dict[str, Any], list[str]]:
    (tmp_path / "a.yml").write_text(text)
    _, draft = convert_config_file(tmp_path / "a.yml", ranks)
    return draft.build_tree(), [line.split(":")[0] for line in draft.unmatched]


def test_a_whole_file(tmp_path: Path) -> None:
    tree, unmatched = _convert(tmp_path, QLORA, ranks=8)
    assert tree == QLORA_TREE
    assert unmatched == ["chat_template", "wandb_project", "special_tokens"]


def test_defaults_of_axolotl_are_written(tmp_path: Path) -> None:
    tree, unmatched = _convert(tmp_path, LEAST)
    assert tree["adapter"] == {"kind": "full"} and tree["base"] == {"path": "m", "quant": None}
    assert tree["data"] == {
        "train": [{"path": "a.jsonl"}],
        "seq_len": 512,
        "packing": False,
        "too_long": "drop",
    }
    assert tree["train"]["epochs"] == 1 and tree["train"]["warmup"] == 0.03
    assert tree["train"]["seed"] == 42 and not unmatched


@pytest.mark.parametrize(
    ("text", "section", "expected"),
    [
        ("adapter: lora", "base", {"path": "m", "quant": None}),
        ("adapter: lora\nload_in_8bit: true", "base", {"quant": {"kind": "int", "bits": 8}}),
        ("adapter: lora\ngptq: true", "base", {"path": "m"}),
        (
            "adapter: qlora\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false}",
            "base",
            {"quant": {"kind": "nf4", "double_quant": False}},
        ),
        ("adapter: lora\nlora_target_modules: [q_proj]", "adapter", {"target_modules": ["q_proj"]}),
        ("adapter: lora\nlora_target_modules: .*_proj", "adapter", {"target_modules": [".*_proj"]}),
        ("adapter: lora\npeft_use_dora: true", "adapter", {"use_dora": True}),
        ("adapter: lora\nloraplus_lr_ratio: 16", "adapter", {"lr_ratio": 16}),
        ("adapter: lora\npeft_init_lora_weights: pissa", "adapter", {"init": "pissa"}),
        ("adapter: lora\nloftq_config: {loftq_bits: 4}", "adapter", {"init": "loftq"}),
        ("val_set_size: 0.1", "data", {"val_split": 0.1}),
        ("train_on_inputs: true", "data", {"loss_on": "all"}),
        ("excess_length_strategy: truncate", "data", {"too_long": "truncate"}),
        ("chat_template_jinja: my.jinja", "data", {"chat_template": "my.jinja"}),
        ("shuffle_merged_datasets: false", "train", {"shuffle": False}),
        ("sdp_attention: true", "base", {"attention": "sdpa"}),
        ("dataset_processes: 4", "data", {"workers": 4}),
    ],
)
def test_options(tmp_path: Path, text: str, section: str, expected: dict[str, Any]) -> None:
    tree, _ = _convert(tmp_path, LEAST + text)
    found = tree[section]
    assert {key: found.get(key) for key in expected} == expected
    assert ("quant" in found) == ("gptq" not in text) or section != "base"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "rl: dpo", "rl: dpo trains on preferences or rewards"),
        (LEAST + "adapter: llama-adapter", "adapter: llama-adapter has no counterpart"),
        ("base_model: m\nlearning_rate: 1", "has no datasets"),
    ],
)
def test_other_kinds_of_training(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _convert(tmp_path, text)
