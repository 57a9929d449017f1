"""The typed description of a run: every key of the YAML file, its type, default and meaning.

The tree is made of frozen pydantic models that refuse unknown keys. Reading files, overrides and
error messages live in ``config_io``; ``docs/configuration.md`` is generated from the
descriptions here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "AdapterConfig",
    "BaseConfig",
    "DataConfig",
    "DataSource",
    "EngineConfig",
    "LoraConfig",
    "LowRankConfig",
    "NoAdapterConfig",
    "QaLoraConfig",
    "QuantConfig",
    "RunConfig",
    "SaveConfig",
    "TrainConfig",
]


def _no_boolean(value: Any) -> Any:
    """Python counts ``True`` as 1; a configuration must not."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


_Int = Annotated[int, BeforeValidator(_no_boolean)]
_Float = Annotated[float, BeforeValidator(_no_boolean)]
_Count = Annotated[_Int, Field(ge=1)]
_Positive = Annotated[_Float, Field(gt=0)]
_Beta = Annotated[_Float, Field(ge=0, lt=1)]
_Names = Annotated[list[str], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class QuantConfig(_Section):
    """How the frozen linear weights are stored. ``null`` keeps them in ``base.compute_dtype``."""

    kind: Literal["nf4", "int"] = Field(
        "nf4", description="nf4: 4-bit NormalFloat (QLoRA). int: affine integers in groups."
    )
    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits a weight; nf4 has 4.")
    group_size: _Int = Field(
        64, ge=8, description="Weights that share one scale, along in_features."
    )
    double_quant: bool = Field(
        True, description="nf4 only: quantize the scales too, within each row."
    )
    solver: Literal["rtn"] = Field(
        "rtn", description="int only: how codes are chosen. rtn: round to nearest."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "nf4" and self.bits != 4:
            raise ValueError(f"nf4 has 4 bits, not {self.bits}; use kind: int for other widths")
        if self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a multiple of 8")
        return self


class BaseConfig(_Section):
    """The frozen base model."""

    path: str = Field(description="Hugging Face directory with safetensors, or a hub id.")
    quant: QuantConfig | None = Field(
        default_factory=lambda: QuantConfig(),
        description="Storage of the frozen linears; null: no quantization.",
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Type of activations, decoded weights, embeddings, norms and biases.",
    )
    attention: str = Field(
        "auto",
        description="transformers' attn_implementation: sdpa, eager, flash_attention_2, ...; "
        "auto: sdpa where the model has it, else eager.",
    )
    trust_remote_code: bool = Field(False, description="Run model code shipped with the base.")
    revision: str | None = Field(None, description="Hub revision; ignored for a directory.")


class LowRankConfig(_Section):
    """What LoRA and QA-LoRA have in common."""

    kind: str
    r: _Int = Field(16, ge=1, description="Rank.")
    alpha: _Float = Field(32.0, gt=0, description="Scaling is alpha / r (rslora: alpha / sqrt(r)).")
    dropout: _Float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | _Names = Field(
        "all-linear",
        description="all-linear: every linear inside the blocks. Or a list: names, name endings "
        "or regular expressions, as in PEFT.",
    )
    rank_pattern: dict[str, _Count] = Field(
        default_factory=dict, description="Regular expression or name ending -> other rank."
    )
    alpha_pattern: dict[str, _Positive] = Field(
        default_factory=dict, description="Regular expression or name ending -> other alpha."
    )


class LoraConfig(LowRankConfig):
    """LoRA (Hu et al. 2021), QLoRA when the base is quantized."""

    kind: Literal["lora"] = "lora"
    embeddings: bool = Field(False, description="Also adapt the input embedding.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (rsLoRA).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA).")
    lr_ratio: _Float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A.")
    init: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="default: A Kaiming-uniform, B zero. pissa: principal singular vectors. "
        "loftq: best low-rank fit of the quantization error.",
    )
    init_iterations: _Int = Field(
        4, ge=1, description="pissa: power iterations of the SVD; loftq: alternations."
    )


class QaLoraConfig(LowRankConfig):
    """QA-LoRA (Xu et al. 2024): an adapter that merges exactly into an integer base."""

    kind: Literal["qalora"] = "qalora"
    pool_size: _Int | None = Field(
        None,
        ge=1,
        description="Inputs summed into one before A: a multiple of base.quant.group_size, and a "
        "divisor of in_features. Default: the group_size.",
    )


class NoAdapterConfig(_Section):
    """No adapter: only for ``dist-peft eval`` of a bare base."""

    kind: Literal["none"] = "none"


AdapterConfig = Annotated[LoraConfig | QaLoraConfig | NoAdapterConfig, Field(discriminator="kind")]


class EngineConfig(_Section):
    """Who shards the base and the optimizer state."""

    kind: Literal["auto", "single", "fsdp2", "zero"] = Field(
        "auto",
        description="auto: single with one process, zero under the deepspeed launcher, else fsdp2.",
    )
    stage: Literal[1, 2, 3] = Field(
        3,
        description="zero: DeepSpeed's ZeRO stage for adapters. 1 shards their optimizer state, 2 "
        "gradients too, 3 the adapters too. The base is sharded in every stage (shard_base).",
    )
    deepspeed_config: str | None = Field(
        None,
        description="zero: DeepSpeed JSON file to take further settings from (buckets, overlap, "
        "logging); what contradicts this configuration is refused.",
    )
    shard_base: bool = Field(
        True, description="false: every rank keeps the whole packed base (small bases)."
    )
    shard_group: Literal["all", "node"] | _Count = Field(
        "all",
        description="all: shard over all ranks. node or a number of ranks: shard inside groups "
        "of that size and replicate across them (HSDP).",
    )
    activation_checkpointing: bool = Field(
        True, description="Keep only each block's input; recompute the rest in backward."
    )
    cpu_offload: Literal["none", "params", "optimizer"] = Field(
        "none",
        description="params (fsdp2): shards and optimizer state rest in host memory (CUDA only). "
        "optimizer (zero): optimizer state rests and is updated in host memory (ZeRO-Offload).",
    )
    start_timeout_minutes: _Float = Field(
        10.0, gt=0, description="How long the ranks wait for each other at the start."
    )
    timeout_minutes: _Float = Field(
        30.0, gt=0, description="A collective that waits longer than this ends the run."
    )


class DataSource(_Section):
    """One file, glob, directory or hub data set, and how its records read."""

    path: str = Field(description="File (.jsonl .json .parquet .csv .tsv .txt), glob, or hub id.")
    format: Literal["auto", "completion", "alpaca", "chat", "text"] = Field(
        "auto", description="auto: told from the columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Role -> column of the file, such as {prompt: question, completion: answer}.",
    )
    template: str | None = Field(
        None, description="Prompt text with {column} fields, for completion and alpaca."
    )
    split: str = Field("train", description="Split of a hub data set.")
    limit: _Int | None = Field(None, ge=1, description="Use only the first N records.")


class DataConfig(_Section):
    """What is learnt, and how records become token rows."""

    train: list[DataSource] = Field(
        min_length=1, description="Training sources: paths or DataSource."
    )
    eval: list[DataSource] = Field(default_factory=list, description="Held-out sources.")
    seq_len: _Int = Field(2048, ge=8, description="Window: tokens in a row.")
    packing: bool = Field(True, description="Several documents a row, isolated from each other.")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="completion: assistant turns or completion only; all: each token."
    )
    too_long: Literal["error", "truncate", "drop", "split"] = Field(
        "error",
        description="A record longer than the window: refuse, cut, leave out, or (text) split.",
    )
    cache_dir: str | None = Field(
        None, description="Token cache; default ~/.cache/dist_peft or $DIST_PEFT_CACHE."
    )

    @model_validator(mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        """A bare string in ``train`` or ``eval`` stands for ``{path: string}``."""
        if isinstance(value, dict):
            value = dict(value)
            for key in ("train", "eval"):
                entries = value.get(key)
                if isinstance(entries, str | dict):
                    entries = [entries]
                if isinstance(entries, list):
                    value[key] = [{"path": e} if isinstance(e, str) else e for e in entries]
        return value


class TrainConfig(_Section):
    """Steps, batch, optimizer and schedule."""

    steps: _Int | None = Field(None, ge=1, description="Optimizer steps; default: one epoch.")
    epochs: _Float | None = Field(None, gt=0, description="Instead of steps.")
    micro_batch: _Int = Field(1, ge=1, description="Rows a rank computes at a time.")
    global_batch: _Int = Field(16, ge=1, description="Rows an optimizer step, over all ranks.")
    lr: _Float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="After warm-up."
    )
    warmup: _Float = Field(
        0.03, ge=0, description="Warm-up: a share of the steps below 1, else a number of steps."
    )
    min_lr_ratio: _Float = Field(0.0, ge=0, le=1, description="Final over peak learning rate.")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw", description="adamw: torch's fused AdamW. The others: bitsandbytes."
    )
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.999), description="Adam's betas.")
    eps: _Float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: _Float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: _Float = Field(1.0, ge=0, description="Clip the global norm; 0: do not.")
    seed: _Int = Field(0, ge=0, lt=2**63, description="Adapter start, data order, dropout.")
    shuffle: bool = Field(True, description="false: rows in file order.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Adapter arithmetic: bf16 = in base.compute_dtype, fp32 = in float32. "
        "Adapter weights and optimizer state are always float32.",
    )
    eval_every: _Int = Field(0, ge=0, description="Steps between evaluations; 0: start and end.")
    log_every: _Int = Field(1, ge=1, description="Steps between lines on the terminal and log.txt.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where present.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give train.steps or train.epochs, not both")
        return self


class SaveConfig(_Section):
    """Where results go."""

    dir: str = Field("runs/default", description="Run directory.")
    every: _Int = Field(100, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: _Int = Field(2, ge=1, description="Newest checkpoints kept.")


class RunConfig(_Section):
    """A whole run. Every key has a default but ``base.path`` and ``data.train``."""

    base: BaseConfig
    adapter: AdapterConfig = Field(default_factory=lambda: LoraConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    data: DataConfig
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    save: SaveConfig = Field(default_factory=lambda: SaveConfig())
    resume: str = Field(
        "auto", description="auto: newest checkpoint of save.dir if any; never; or a path."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        """An adapter section without ``kind`` is the default adapter's."""
        if isinstance(value, dict) and isinstance(value.get("adapter"), dict):
            value = {**value, "adapter": {"kind": "lora", **value["adapter"]}}
        return value
