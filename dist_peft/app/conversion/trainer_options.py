"""Options that axolotl and LLaMA-Factory share: those of transformers' ``Trainer``.

Batches: a device computes ``micro`` sequences at a time and ``accumulation`` such micro-batches a
step, so that a step has ``micro x accumulation x devices`` sequences. Here ``train.global_batch``
is that product, the same on any number of ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile

__all__ = [
    "NEEDLESS_OPTIONS",
    "TrainerDefaults",
    "convert_batch",
    "convert_engine",
    "convert_evaluation",
    "convert_optimizer",
    "convert_precision",
    "convert_schedule",
    "convert_trackers",
]

NEEDLESS_OPTIONS = frozenset(
    [
        "pad_to_sequence_len",
        "pad_to_max_length",
        "strict",
        "debug",
        "local_rank",
        "tokenizer_type",
        "model_type",
        "use_fast_tokenizer",
        "gradient_checkpointing_kwargs",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "remove_unused_columns",
        "low_cpu_mem_usage",
        "save_safetensors",
        "do_train",
        "do_eval",
        "overwrite_cache",
        "plot_loss",
        "save_only_model",
        "include_tokens_per_second",
        "per_device_eval_batch_size",
        "eval_batch_size",
        "eval_sample_packing",
        "logging_first_step",
        "bf16_full_eval",
        "dataset_keep_in_memory",
        "use_reentrant_gc",
        "preprocessing_batch_size",
    ]
)
"""Keys that ask for nothing that changes a trained adapter, or for that which is so here."""

_TRACKERS = ("wandb", "mlflow", "trackio")
_SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainerDefaults:
    """Values of keys that the file leaves out, where they differ from those of this project."""

    trainer: str
    micro_batch: int
    epochs: float
    lr: float | None
    schedule: str
    warmup: float
    seed: int
    seq_len: int

    @property
    def origin(self) -> str:
        """The comment of a value that is not in the file."""
        return f"default of {self.trainer}"


def convert_batch(
    file: ForeignFile, draft: ConfigDraft, defaults: TrainerDefaults, micro_key: str, ranks: int
) -> None:
    """Set ``train.micro_batch`` and ``train.global_batch``.

    Args:
        micro_key: the key of a device's sequences.
        ranks: devices that the file was for.
    """
    micro = file.take_number(micro_key, defaults.micro_batch)
    steps = file.take_number("gradient_accumulation_steps", 1)
    draft.put_setting("train.micro_batch", micro, micro_key)
    whole = file.take_number("batch_size")  # of axolotl: that of a step, on one device
    product, origin = (micro or 1) * (steps or 1), f"{micro_key} x gradient_accumulation_steps"
    if whole:
        product, origin = whole, "batch_size"
    draft.put_setting("train.global_batch", int(product * ranks), f"{origin} x {ranks} devices")


def convert_optimizer(
    file: ForeignFile, draft: ConfigDraft, defaults: TrainerDefaults, optimizer_key: str
) -> None:
    """Set the learning rate, optimizer, clipping and regularization."""
    rate = file.take_number("learning_rate")
    if rate is not None:
        draft.put_setting("train.lr", rate, "learning_rate")
    elif defaults.lr is not None:
        draft.put_setting("train.lr", defaults.lr, defaults.origin)
    if (name := file.take_value(optimizer_key)) is not None:
        draft.put_known_value("train.optimizer", optimizer_key, name, ())
    betas = [file.take_number("adam_beta1"), file.take_number("adam_beta2")]
    if betas != [None, None]:
        pair = [betas[0] or 0.9, betas[1] or 0.999]
        draft.put_setting("train.betas", pair, "adam_beta1, adam_beta2")
    same = {
        "adam_epsilon": "eps",
        "weight_decay": "weight_decay",
        "max_grad_norm": "max_grad_norm",
        "neftune_noise_alpha": "neftune_alpha",
    }
    for name, ours in same.items():
        if (value := file.take_number(name)) is not None:
            draft.put_setting(f"train.{ours}", value, name)
    seed = file.take_number("seed")
    draft.put_setting(
        "train.seed",
        defaults.seed if seed is None else seed,
        defaults.origin if seed is None else "seed",
    )


def convert_schedule(
    file: ForeignFile,
    draft: ConfigDraft,
    defaults: TrainerDefaults,
    schedule_key: str,
    epochs_key: str,
) -> None:
    """Set the number of steps or epochs, the schedule and the warm-up."""
    steps = file.take_number("max_steps")
    epochs = file.take_number(epochs_key)
    if steps is not None and steps > 0:
        draft.put_setting("train.steps", steps, "max_steps")
    else:
        origin = defaults.origin if epochs is None else epochs_key
        draft.put_setting("train.epochs", epochs or defaults.epochs, origin)
    schedule = file.take_value(schedule_key)
    if schedule is None:
        draft.put_setting("train.schedule", defaults.schedule, defaults.origin)
    else:
        draft.put_known_value("train.schedule", schedule_key, schedule, _SCHEDULES)
    options = file.take_value("lr_scheduler_kwargs", {})
    floor = file.take_number("cosine_min_lr_ratio")
    if floor is None and isinstance(options, dict):
        floor = options.pop("min_lr_rate", None)
    if floor is not None:
        draft.put_setting("train.min_lr_ratio", floor, "cosine_min_lr_ratio or min_lr_rate")
    draft.list_unmatched("lr_scheduler_kwargs", options, "the schedule has no such option")
    _convert_warmup(file, draft, defaults, str(schedule).lower())


def _convert_warmup(
    file: ForeignFile, draft: ConfigDraft, defaults: TrainerDefaults, schedule: str
) -> None:
    steps, share = file.take_number("warmup_steps"), file.take_number("warmup_ratio")
    if schedule == "constant":  # of transformers: without warm-up, which constant_with_warmup has
        draft.put_setting("train.warmup", 0, "lr_scheduler: constant has no warm-up")
    elif steps:
        draft.put_setting("train.warmup", steps, "warmup_steps")
    elif share is not None or steps is not None:
        draft.put_setting("train.warmup", share or 0, "warmup_ratio")
    else:
        draft.put_setting("train.warmup", defaults.warmup, defaults.origin)


def convert_precision(file: ForeignFile, draft: ConfigDraft) -> None:
    """Set ``base.compute_dtype`` from ``bf16`` and ``fp16``."""
    for name, dtype in (
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("pure_bf16", "bfloat16"),
        ("fp16", "float16"),
        ("float16", "float16"),
    ):
        if file.has_value(name):
            draft.put_setting("base.compute_dtype", dtype, f"{name}: {file.take_value(name)}")
        file.take_value(name)


def convert_evaluation(file: ForeignFile, draft: ConfigDraft) -> None:
    """Set evaluations and checkpoints, which are every so many steps here.

    Early stopping and the best checkpoint compare evaluations: without held-out data, or without a
    number of steps between them, they are listed.
    """
    if (steps := file.take_number("logging_steps")) is not None:
        _put_step_count(draft, "train.log_every", "logging_steps", steps)
    evaluations = {"eval": "train.eval_every", "save": "save.every"}
    for word, key in evaluations.items():
        steps = file.take_number(f"{word}_steps")
        parts = file.take_value(f"{word}s_per_epoch")
        strategy = file.take_value(f"{word}_strategy")
        if word == "eval":
            strategy = file.take_value("evaluation_strategy", strategy)
        if strategy in ("no", False):
            draft.put_setting(key, 0, f"{word}_strategy: no")
        elif strategy in ("epoch", "best"):
            draft.list_unmatched(f"{word}_strategy", strategy, f"{key} is a number of steps")
        elif steps is not None:
            _put_step_count(draft, key, f"{word}_steps", steps)
        draft.list_unmatched(f"{word}s_per_epoch", parts, f"{key} is a number of steps")
    if limit := file.take_number("save_total_limit"):
        draft.put_setting("save.keep", limit, "save_total_limit")
    evaluates = {"data.eval", "data.val_split"} & set(draft.settings)
    every = draft.settings.get("train.eval_every")
    compares = bool(evaluates and every and every.value)
    for name, key in (
        ("early_stopping_patience", "train.early_stop"),
        ("early_stopping_steps", "train.early_stop"),
        ("load_best_model_at_end", "save.keep_best"),
    ):
        value = file.take_value(name)
        if value and compares:
            draft.put_setting(key, value, name)
        else:
            reason = f"{key} needs data.eval or data.val_split, and train.eval_every"
            draft.list_unmatched(name, value, reason)
    metric = file.take_value("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        draft.list_unmatched("metric_for_best_model", metric, "the held-out loss is compared")


def _put_step_count(draft: ConfigDraft, key: str, name: str, steps: float) -> None:
    if isinstance(steps, int) or steps >= 1:
        draft.put_setting(key, int(steps), name)
    else:
        draft.list_unmatched(name, steps, f"a share of the steps; {key} is a number of steps")


def convert_engine(file: ForeignFile, draft: ConfigDraft) -> None:
    """Set the engine from ``deepspeed``, ``fsdp`` and gradient checkpointing."""
    checkpointing = file.take_value("gradient_checkpointing")
    if file.take_value("disable_gradient_checkpointing"):
        checkpointing = False
    if checkpointing is not None:
        value = bool(checkpointing)
        draft.put_setting("engine.activation_checkpointing", value, "gradient_checkpointing")
    deepspeed, fsdp = file.take_value("deepspeed"), file.take_value("fsdp")
    options = file.take_value("fsdp_config", {})
    version = file.take_value("fsdp_version")
    if deepspeed:
        _convert_deepspeed(deepspeed, file.path.parent, draft)
    elif fsdp or options or version:
        draft.put_setting("engine.kind", "fsdp2", "fsdp")
        options = options if isinstance(options, dict) else {}
        words = fsdp if isinstance(fsdp, list) else str(fsdp).split()
        offloads = ("offload_params", "fsdp_offload_params")
        if any(options.get(name) for name in offloads) or "offload" in words:
            draft.put_setting("engine.cpu_offload", "params", "fsdp: offload")
    seconds = file.take_number("ddp_timeout")
    if seconds and seconds <= 30_000 * 60:
        draft.put_setting("engine.timeout_minutes", seconds / 60, "ddp_timeout, in seconds")
    else:
        draft.list_unmatched("ddp_timeout", seconds, "engine.timeout_minutes is at most 30000")


def _convert_deepspeed(given: Any, directory: Path, draft: ConfigDraft) -> None:
    """Set the ZeRO stage from the JSON file or section, or from the file's name."""
    name = "deepspeed" if isinstance(given, dict) else f"deepspeed: {given}"
    options = given if isinstance(given, dict) else _read_json(directory, str(given))
    zero = options.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage is None:
        digits = [d for d in "123" if f"z{d}" in str(given) or f"zero{d}" in str(given)]
        stage = int(digits[0]) if digits else 3
        name += ", by its name" if digits else ", not found: stage 3"
    if stage == 0:
        draft.list_unmatched("deepspeed", given, "stage 0 shards nothing; engine.kind: auto")
        return
    draft.put_setting("engine.kind", "zero", name)
    draft.put_setting("engine.stage", stage, name)
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        draft.put_setting("engine.cpu_offload", "optimizer", "offload_optimizer")


def _read_json(directory: Path, given: str) -> dict[str, Any]:
    for place in (Path(given), directory / given):
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def convert_trackers(file: ForeignFile, draft: ConfigDraft) -> None:
    """Set ``save.track`` from ``report_to``, or the trackers that have settings of their own."""
    given = file.take_value("report_to", [])
    names = [given] if isinstance(given, str) else list(given)
    wanted = [name for name in _TRACKERS if name in names]
    for name in _TRACKERS:
        switch = file.take_value(f"use_{name}")
        settings = [key for key in file.list_names() if key.startswith(f"{name}_")]
        if name not in wanted and (switch or any(map(file.has_value, settings))):
            wanted.append(name)
    others = [n for n in names if n not in (*_TRACKERS, "tensorboard", "none")]
    draft.list_unmatched("report_to", ", ".join(others), "save.track has no such tracker")
    if wanted:
        draft.put_setting("save.track", wanted, "report_to, or settings of the tracker")
