"""Values of other trainers for keys that exist here, and the settings that say the same.

By key, then by value as text in lower case (YAML reads ``no`` and ``off`` as false): the settings,
as overrides of the command line. A test reads each of them into a valid configuration. Without
settings there is no such value here.
"""

import re
from typing import Any

import yaml

__all__ = ["PEER_VALUES", "describe_peer_value", "find_peer_value", "read_setting"]

Settings = tuple[str, ...]

_NF4: Settings = ("base.quant={kind: nf4}",)
_INT4: Settings = ("base.quant={kind: int}",)
_INT8: Settings = ("base.quant={kind: int, bits: 8}",)
_UNQUANTIZED: Settings = ("base.quant=null",)
_GPTQ: Settings = ("base.quant={kind: int, solver: gptq}",)
_HQQ: Settings = ("base.quant={kind: int, solver: hqq}",)
_ADAMW: Settings = ("train.optimizer=adamw",)
_ADAMW8: Settings = ("train.optimizer=adamw8bit",)
_PAGED: Settings = ("train.optimizer=paged_adamw",)
_PAGED8: Settings = ("train.optimizer=paged_adamw8bit",)
_BF16: Settings = ("base.compute_dtype=bfloat16",)
_FP16: Settings = ("base.compute_dtype=float16",)
_FP32: Settings = ("base.compute_dtype=float32",)
_FSDP2: Settings = ("engine.kind=fsdp2",)
_DDP: Settings = ("engine.kind=fsdp2", "engine.shard_base=false")
_ZERO: Settings = ("engine.kind=zero",)
_CHAT: Settings = ("data.train={path: FILE, format: chat}",)
_TEXT: Settings = ("data.train={path: FILE, format: text}",)
_CLASSIFIER: Settings = (
    "base.head=classifier",
    "data.train={path: FILE, format: classification, labels: [A, B]}",
)
_PROMPT: Settings = ("adapter={kind: prompt}",)
_PREFIX: Settings = ("adapter={kind: prefix}",)
_PTUNING: Settings = ("adapter={kind: ptuning}",)
_LISA: Settings = ("adapter={kind: partial, sample_blocks: {}}",)
_BITFIT: Settings = ("adapter={kind: partial, parts: [biases]}",)
_LAST_BLOCKS: Settings = ("adapter={kind: partial, last_blocks: 2}",)

_QUANTIZATIONS: dict[str, Settings] = {
    "nf4": _NF4,
    "4bit": _NF4,
    "4": _NF4,
    "bnb": _NF4,
    "bitsandbytes": _NF4,
    "qlora": _NF4,
    "true": _NF4,
    "int": _INT4,
    "int4": _INT4,
    "int8": _INT8,
    "8bit": _INT8,
    "8": _INT8,
    "gptq": _GPTQ,
    "hqq": _HQQ,
    "false": _UNQUANTIZED,
    "none": _UNQUANTIZED,
    "fp4": ("base.quant={kind: fp4}",),
    "llm_int8": ("base.quant={kind: llm_int8}",),
    "mxfp4": ("base.quant={kind: mxfp4}",),
    "fp8": ("base.quant={kind: fp8}",),
    "nvfp4": ("base.quant={kind: nvfp4}",),
    "awq": (),
    "aqlm": (),
    "eetq": (),
}

PEER_VALUES: dict[str, dict[str, Settings]] = {
    "base.quant": _QUANTIZATIONS,
    "base.quant.kind": _QUANTIZATIONS,
    "base.quant.solver": {"nearest": ("base.quant={kind: int, solver: rtn}",), "awq": ()},
    "base.head": {
        "causal_lm": ("base.head=lm",),
        "seq_2_seq_lm": (),
        "seq_cls": _CLASSIFIER,
        "sequence_classification": _CLASSIFIER,
        "token_cls": (),
    },
    "base.compute_dtype": {
        "bf16": _BF16,
        "torch.bfloat16": _BF16,
        "auto": _BF16,
        "fp16": _FP16,
        "half": _FP16,
        "torch.float16": _FP16,
        "fp32": _FP32,
        "float": _FP32,
        "torch.float32": _FP32,
        "mxfp4": ("base.quant={kind: mxfp4}",),
        "fp8": ("base.quant={kind: fp8}",),
    },
    "adapter.kind": {
        "qlora": ("adapter.kind=lora", "base.quant={kind: nf4}"),
        "dora": ("adapter={kind: lora, use_dora: true}",),
        "qdora": ("adapter={kind: lora, use_dora: true}", "base.quant={kind: nf4}"),
        "rslora": ("adapter={kind: lora, use_rslora: true}",),
        "pissa": ("adapter={kind: lora, init: pissa}",),
        "loftq": ("adapter={kind: lora, init: loftq}",),
        "qa-lora": ("adapter={kind: qalora}", "base.quant={kind: int}"),
        "qa_lora": ("adapter={kind: qalora}", "base.quant={kind: int}"),
        "p_tuning": _PTUNING,
        "p-tuning": _PTUNING,
        "prompt_tuning": _PROMPT,
        "prefix_tuning": _PREFIX,
        "houlsby": ("adapter={kind: bottleneck, placement: houlsby}",),
        "pfeiffer": ("adapter={kind: bottleneck, placement: pfeiffer}",),
        "double_seq_bn": ("adapter={kind: bottleneck, placement: houlsby}",),
        "seq_bn": ("adapter={kind: bottleneck, placement: pfeiffer}",),
        "par_bn": ("adapter={kind: bottleneck, placement: parallel}",),
        "bitfit": _BITFIT,
        "lisa": _LISA,
        "freeze": _LAST_BLOCKS,
        "fft": ("adapter={kind: full}",),
        "oft": (),
        "boft": (),
        "llama-adapter": (),
    },
    "adapter.target_modules": {
        "all": ("adapter.target_modules=all-linear",),
        "all_linear": ("adapter.target_modules=all-linear",),
        "linear": ("adapter.target_modules=all-linear",),
    },
    "adapter.init": {
        "true": ("adapter.init=default",),
        "gaussian": (),
        "false": (),
        "kaiming": ("adapter.init=default",),
        "pissa_niter_4": ("adapter={init: pissa, init_iterations: 4}",),
        "pissa_niter_16": ("adapter={init: pissa, init_iterations: 16}",),
        "lora-ga": ("adapter.init=lora_ga",),
        "olora": (),
        "orthogonal": (),
        "corda": (),
    },
    "train.optimizer": {
        "adam": _ADAMW,
        "adamw_torch": _ADAMW,
        "adamw_torch_fused": _ADAMW,
        "adamw_hf": _ADAMW,
        "adamw_apex_fused": _ADAMW,
        "torch.optim.adamw": _ADAMW,
        "adamw_8bit": _ADAMW8,
        "adamw_bnb_8bit": _ADAMW8,
        "bitsandbytes.optim.adamw8bit": _ADAMW8,
        "paged_adamw_32bit": _PAGED,
        "bitsandbytes.optim.pagedadamw": _PAGED,
        "paged_adamw_8bit": _PAGED8,
        "bitsandbytes.optim.pagedadamw8bit": _PAGED8,
        "adafactor": (),
        "lion": (),
        "lion_8bit": (),
        "sgd": (),
        "muon": (),
        "galore_adamw": (),
        "ademamix": (),
        "came": (),
    },
    "train.schedule": {
        "constant_with_warmup": ("train.schedule=constant",),
        "cosine_with_min_lr": ("train.schedule=cosine", "train.min_lr_ratio=0.1"),
        "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": (
            "train.schedule=cosine",
        ),
        "cosine_with_restarts": (),
        "polynomial": (),
        "inverse_sqrt": (),
        "warmup_stable_decay": (),
        "rex": (),
        "one_cycle": (),
    },
    "train.precision": {
        "bfloat16": ("train.precision=bf16",),
        "float32": ("train.precision=fp32",),
        "false": ("train.precision=fp32",),
        "fp16": ("base.compute_dtype=float16", "train.precision=bf16"),
        "float16": ("base.compute_dtype=float16", "train.precision=bf16"),
        "mxfp4": ("base.quant={kind: mxfp4}",),
        "fp8": ("base.quant={kind: fp8}",),
    },
    "train.metric_for_best": {"eval_loss": ("train.metric_for_best=loss",)},
    "train.device": {"gpu": ("train.device=cuda",), "mps": (), "xpu": (), "npu": ()},
    "engine.kind": {
        "zero1": ("engine.kind=zero", "engine.stage=1"),
        "zero2": ("engine.kind=zero", "engine.stage=2"),
        "zero3": ("engine.kind=zero", "engine.stage=3"),
        "deepspeed": _ZERO,
        "fsdp": _FSDP2,
        "fsdp1": _FSDP2,
        "ddp": _DDP,
        "multi_gpu": _DDP,
        "megatron": (),
        "tensor_parallel": (),
    },
    "engine.shard_group": {
        "full_shard": ("engine.shard_group=all",),
        "hybrid_shard": ("engine.shard_group=node",),
        "no_shard": ("engine.shard_base=false",),
    },
    "engine.cpu_offload": {
        "true": ("engine.cpu_offload=params",),
        "false": ("engine.cpu_offload=none",),
        "cpu": ("engine.cpu_offload=params",),
    },
    "engine.activation_checkpointing": {
        "unsloth": ("engine.activation_checkpointing=true",),
        "offload": ("engine.activation_checkpointing=true",),
    },
    "data.train[].format": {
        "sharegpt": _CHAT,
        "chat_template": _CHAT,
        "messages": _CHAT,
        "openai": _CHAT,
        "conversational": _CHAT,
        "instruct": ("data.train={path: FILE, format: alpaca}",),
        "prompt_completion": ("data.train={path: FILE, format: completion}",),
        "pretrain": _TEXT,
        "pt": _TEXT,
        "raw": _TEXT,
        "language_modeling": _TEXT,
        "dpo": (),
        "kto": (),
        "input_output": (),
    },
    "data.loss_on": {
        "assistant": ("data.loss_on=completion",),
        "assistant_only": ("data.loss_on=completion",),
        "completion_only": ("data.loss_on=completion",),
        "false": ("data.loss_on=completion",),
        "true": ("data.loss_on=all",),
    },
    "data.too_long": {
        "true": ("data.too_long=truncate",),
        "truncation": ("data.too_long=truncate",),
        "keep_start": ("data.too_long=truncate",),
        "raise": ("data.too_long=error",),
        "keep_end": (),
    },
    "data.mixing": {
        "concat": ("data.mixing=joined",),
        "interleave_under": ("data.mixing=weights",),
        "interleave_over": ("data.mixing=weights",),
    },
    "data.packing": {
        "bfd": ("data.packing=true",),
        "ffd": ("data.packing=true",),
        "wrapped": (),
    },
    "train.warmup": {"auto": ("train.warmup=0.03",)},
    "train.eval_every": {"false": ("train.eval_every=0",), "epoch": ()},
    "save.track": {
        "none": ("save.track=[]",),
        "tensorboard": ("save.track=[]",),
        "wb": ("save.track=[wandb]",),
        "comet": (),
        "comet_ml": (),
        "swanlab": (),
    },
    "save.every": {"false": ("save.every=0",), "epoch": ()},
    "resume": {"true": ("resume=auto",), "false": ("resume=never",)},
}


def find_peer_value(key: str, given: object) -> Settings | None:
    """Return the settings that say the same as ``given`` for ``key``; None if it is not known.

    Args:
        key: with the indices of lists, such as ``data.train.0.format``.
        given: as read from YAML; only numbers, booleans and text are known.
    """
    if not isinstance(given, str | bool | int):
        return None
    key = re.sub(r"\.\d+(?=\.|$)", "[]", key).replace("data.eval", "data.train")
    text = str(given).strip().lower()
    known = PEER_VALUES.get(key, {})
    if text not in known and key == "adapter.kind":  # PEFT writes its types in capital letters
        kinds = ("lora", "vera", "loha", "lokr", "adalora", "ia3", "full", "none", "prefix")
        return (f"adapter.kind={text}",) if text in kinds else None
    return known.get(text)


def describe_peer_value(key: str, given: object) -> str | None:
    """Return the part of a message that says where ``given`` for ``key`` is here; None: unknown."""
    settings = find_peer_value(key, given)
    if settings is None:
        return None
    if not settings:
        return "there is no such value here"
    return "write " + " and ".join(setting.replace("=", ": ", 1) for setting in settings)


def read_setting(setting: str) -> tuple[str, Any]:
    """Return the key and the value of one setting of ``PEER_VALUES``."""
    key, _, text = setting.partition("=")
    return key, yaml.safe_load(text)
