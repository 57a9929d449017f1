"""Options of transformers' Trainer: batches, schedules, evaluations, engines."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.app.conversion import trainer_options as options
from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile

DEFAULTS = options.TrainerDefaults("axolotl", 2, 3, 1e-4, "linear", 0.1, 42, 512)


class Case:
    """A file, the draft that is made of it, and the settings of the draft."""

    def __init__(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.yml").write_text(f"base_model: m\n{text}\n")
        self.file, self.draft = ForeignFile(tmp_path / "a.yml"), ConfigDraft()

    @property
    def settings(self) -> dict[str, Any]:
        return {key: setting.value for key, setting in self.draft.settings.items()}


@pytest.mark.parametrize(
    ("text", "micro", "whole"),
    [
        ("", 2, 6),
        ("micro_batch_size: 4\ngradient_accumulation_steps: 8", 4, 96),
        ("micro_batch_size: 4\nbatch_size: 8", 4, 24),
    ],
)
def test_batches(tmp_path: Path, text: str, micro: int, whole: int) -> None:
    case = Case(tmp_path, text)
    options.convert_batch(case.file, case.draft, DEFAULTS, "micro_batch_size", 3)
    assert case.settings == {"train.micro_batch": micro, "train.global_batch": whole}


def test_optimizer(tmp_path: Path) -> None:
    case = Case(tmp_path, "learning_rate: 3e-5\noptim: adamw_torch\nadam_beta2: 0.95\nseed: 7")
    options.convert_optimizer(case.file, case.draft, DEFAULTS, "optim")
    assert case.settings == {
        "train.lr": 3e-5,
        "train.optimizer": "adamw",
        "train.betas": [0.9, 0.95],
        "train.seed": 7,
    }
    case = Case(tmp_path, "optim: lion\nadam_epsilon: 1e-6\nneftune_noise_alpha: 5")
    options.convert_optimizer(case.file, case.draft, DEFAULTS, "optim")
    expected = {"train.lr": 1e-4, "train.eps": 1e-6, "train.neftune_alpha": 5, "train.seed": 42}
    assert case.settings == expected
    assert case.draft.unmatched[0].startswith("optim: lion -- ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"epochs": 3, "schedule": "linear", "warmup": 0.1}),
        ("max_steps: 9\nepochs: 2", {"steps": 9, "schedule": "linear", "warmup": 0.1}),
        ("max_steps: -1\nepochs: 2", {"epochs": 2, "schedule": "linear", "warmup": 0.1}),
        ("s: cosine\nwarmup_steps: 20\nwarmup_ratio: 0.5", {"schedule": "cosine", "warmup": 20}),
        ("s: cosine\nwarmup_steps: 0\nwarmup_ratio: 0.5", {"schedule": "cosine", "warmup": 0.5}),
        ("s: cosine\nwarmup_steps: 0", {"schedule": "cosine", "warmup": 0}),
        ("s: constant\nwarmup_steps: 9", {"schedule": "constant", "warmup": 0}),
        ("s: constant_with_warmup\nwarmup_steps: 9", {"schedule": "constant", "warmup": 9}),
        ("s: cosine\ncosine_min_lr_ratio: 0.2", {"schedule": "cosine", "min_lr_ratio": 0.2}),
        (
            "s: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.3}",
            {"schedule": "cosine", "min_lr_ratio": 0.3},
        ),
    ],
)
def test_schedules(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    case = Case(tmp_path, text)
    options.convert_schedule(case.file, case.draft, DEFAULTS, "s", "epochs")
    expected = {"epochs": 3} | {"warmup": 0.1} | expected
    if "steps" in expected:
        del expected["epochs"]
    assert case.settings == {f"train.{key}": value for key, value in expected.items()}


def test_precision(tmp_path: Path) -> None:
    for text, dtype in (("bf16: auto", "bfloat16"), ("bf16: false\nfp16: true", "float16")):
        case = Case(tmp_path, text)
        options.convert_precision(case.file, case.draft)
        assert case.settings == {"base.compute_dtype": dtype}
        assert case.file.list_names() == ["base_model"]


def test_evaluations(tmp_path: Path) -> None:
    case = Case(
        tmp_path,
        "logging_steps: 5\neval_steps: 20\nsave_steps: 0.1\nsave_total_limit: 4\n"
        "early_stopping_patience: 3\nload_best_model_at_end: true\nmetric_for_best_model: rouge",
    )
    case.draft.put_setting("data.val_split", 0.1, "x")
    options.convert_evaluation(case.file, case.draft)
    assert case.settings == {
        "data.val_split": 0.1,
        "train.log_every": 5,
        "train.eval_every": 20,
        "save.keep": 4,
        "train.early_stop": 3,
        "save.keep_best": True,
    }
    assert [line.split(" -- ")[0] for line in case.draft.unmatched] == [
        "save_steps: 0.1",
        "metric_for_best_model: rouge",
    ]


def test_comparisons_need_evaluations(tmp_path: Path) -> None:
    text = "eval_strategy: epoch\nsave_strategy: no\nearly_stopping_patience: 3\nevals_per_epoch: 4"
    case = Case(tmp_path, text)
    options.convert_evaluation(case.file, case.draft)
    assert case.settings == {"save.every": 0}
    assert [line.split(":")[0] for line in case.draft.unmatched] == [
        "eval_strategy",
        "evals_per_epoch",
        "early_stopping_patience",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepspeed: ds/zero2.json", {"kind": "zero", "stage": 2}),
        ("deepspeed: ds/mine.json", {"kind": "zero", "stage": 1, "cpu_offload": "optimizer"}),
        ("deepspeed: {zero_optimization: {stage: 3}}", {"kind": "zero", "stage": 3}),
        ("deepspeed: ds/none.json", {"kind": "zero", "stage": 3}),
        ("fsdp: [full_shard, auto_wrap]", {"kind": "fsdp2"}),
        ("fsdp: full_shard offload", {"kind": "fsdp2", "cpu_offload": "params"}),
        (
            "fsdp_version: 2\nfsdp_config: {offload_params: true}",
            {"kind": "fsdp2", "cpu_offload": "params"},
        ),
        ("gradient_checkpointing: unsloth", {"activation_checkpointing": True}),
        ("disable_gradient_checkpointing: true", {"activation_checkpointing": False}),
        ("ddp_timeout: 7200", {"timeout_minutes": 120}),
        ("deepspeed: {zero_optimization: {stage: 0}}\nddp_timeout: 180000000", {}),
    ],
)
def test_engines(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "ds").mkdir()
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "ds" / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    case = Case(tmp_path, text)
    options.convert_engine(case.file, case.draft)
    assert case.settings == {f"engine.{key}": value for key, value in expected.items()}
    assert len(case.draft.unmatched) == (0 if expected else 2)


@pytest.mark.parametrize(
    ("text", "expected", "listed"),
    [
        ("report_to: none", None, []),
        ("report_to: [wandb, tensorboard]", ["wandb"], []),
        ("report_to: mlflow\nwandb_project:", ["mlflow"], []),
        ("wandb_project: mine\nuse_mlflow: true", ["wandb", "mlflow"], []),
        ("report_to: swanlab", None, ["report_to: swanlab -- save.track has no such tracker"]),
    ],
)
def test_trackers(tmp_path: Path, text: str, expected: list[str] | None, listed: list[str]) -> None:
    case = Case(tmp_path, text)
    options.convert_trackers(case.file, case.draft)
    assert case.settings.get("save.track") == expected and case.draft.unmatched == listed
