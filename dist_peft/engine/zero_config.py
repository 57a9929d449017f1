"""The run configuration as DeepSpeed's, with a user's own JSON file merged in.

The run configuration decides; the file adds settings that it lacks (bucket sizes, overlap,
communication logging, ...). A value of the file that says something else than the run is refused
by name, and so are settings that would harm packed bytes (``fp16``, ``bf16``: DeepSpeed casts
parameters) or have a second owner (``optimizer``, ``scheduler``). ``"auto"``, as other trainers
write it, stands for the run's value.
"""

import json
from pathlib import Path
from typing import Any

from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.core.errors import UserError

__all__ = ["build_deepspeed_config", "check_zero_support", "shrink_reduce_bucket"]

_OWNED = {
    "optimizer": "train.optimizer, train.lr, train.betas, ...",
    "scheduler": "train.schedule and train.warmup",
    "activation_checkpointing": "engine.activation_checkpointing",
    "quantize_training": "base.quant",
    "compression_training": "base.quant",
}


def check_zero_support(engine: EngineConfig, train: TrainConfig) -> None:
    """Refuse options that ZeRO does not have.

    Raises:
        UserError: offloaded parameters, or another optimizer than AdamW.
    """
    if engine.cpu_offload == "params":
        raise UserError(
            "engine.cpu_offload: params is fsdp2's; with zero use cpu_offload: optimizer"
        )
    if train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer {train.optimizer} keeps state that DeepSpeed cannot shard; use "
            "adamw, or engine.kind: fsdp2"
        )


def build_deepspeed_config(engine: EngineConfig, train: TrainConfig, ranks: int) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    Micro-batches, accumulation and clipping are driven step by step by the engine, so DeepSpeed
    gets the neutral values; the user's file is checked against the run's.

    Raises:
        UserError: the file cannot be read, or contradicts the run configuration.
    """
    config: dict[str, Any] = {}
    if engine.deepspeed_config is not None:
        config = _read_deepspeed_json(Path(engine.deepspeed_config))
        _check_deepspeed_config(config, engine, train, ranks, engine.deepspeed_config)
    zero: dict[str, Any] = {"overlap_comm": False, "reduce_bucket_size": 50_000_000}
    if engine.stage == 3:
        # adapters are small tensors: with DeepSpeed's default of 100,000 they would all stay whole
        zero["stage3_param_persistence_threshold"] = 0
    zero |= {k: v for k, v in config.get("zero_optimization", {}).items() if v != "auto"}
    zero["stage"] = engine.stage
    if engine.cpu_offload == "optimizer":
        zero["offload_optimizer"] = {**zero.get("offload_optimizer", {}), "device": "cpu"}
    return config | {
        "zero_optimization": zero,
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled at start
        "steps_per_print": config.get("steps_per_print", 10**9),
    }


def shrink_reduce_bucket(config: dict[str, Any], values: int) -> dict[str, Any]:
    """Return ``config`` with a bucket of at most ``values`` gradients, all that there are.

    DeepSpeed makes a buffer of the bucket's size, whatever goes into it.
    """
    zero = config["zero_optimization"]
    size = min(zero["reduce_bucket_size"], max(1, values))
    return config | {"zero_optimization": {**zero, "reduce_bucket_size": size}}


def _read_deepspeed_json(path: Path) -> dict[str, Any]:
    key = "engine.deepspeed_config"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{key}: {path} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("zero_optimization", {}), dict):
        raise UserError(f"{key}: {path} is not a DeepSpeed configuration (a JSON object)")
    return value


def _check_deepspeed_config(
    config: dict[str, Any], engine: EngineConfig, train: TrainConfig, ranks: int, file: str
) -> None:
    def refuse_config_value(key: str, found: object, run_key: str, wanted: object) -> None:
        raise UserError(
            f"{file} says {key} = {json.dumps(found)} but the run's {run_key} is "
            f'{json.dumps(wanted)}; change one of them, or write "auto" in the file'
        )

    for key, owner in _OWNED.items():
        if key in config:
            raise UserError(f"{file} has a section {key!r}, which belongs to {owner}; remove it")
    for key in ("fp16", "bf16"):
        section = config.get(key, {})
        if section.get("enabled") not in (None, False, "auto"):
            raise UserError(
                f"{file} enables {key}, with which DeepSpeed casts parameters; adapters stay "
                "float32 and compute in train.precision. Remove the section"
            )
        config.pop(key, None)
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    wanted_offload = "cpu" if engine.cpu_offload == "optimizer" else "none"
    micro_steps = -(-train.global_batch // (train.micro_batch * ranks))
    checks = [
        ("zero_optimization.stage", zero.get("stage", "auto"), "engine.stage", engine.stage),
        (
            "zero_optimization.offload_optimizer.device",
            offload if offload != "none" or wanted_offload == "none" else "auto",
            "engine.cpu_offload",
            wanted_offload,
        ),
        ("train_batch_size", None, "train.global_batch", train.global_batch),
        ("train_micro_batch_size_per_gpu", None, "train.micro_batch", train.micro_batch),
        ("gradient_accumulation_steps", None, "number of micro-batches a step", micro_steps),
        ("gradient_clipping", None, "train.max_grad_norm", train.max_grad_norm),
    ]
    for key, value, run_key, wanted in checks:
        found = config.get(key, "auto") if value is None else value
        if found != "auto" and found != wanted:
            refuse_config_value(key, found, run_key, wanted)
    if zero.get("offload_param", {}).get("device", "none") != "none":
        raise UserError(
            f"{file} has zero_optimization.offload_param, which concerns only the adapters here; "
            "remove it"
        )
