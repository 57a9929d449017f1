"""The typed description of a run: every key of the YAML file, its type, default and meaning.

Frozen pydantic models, read by ``core.config.io``; ``docs/configuration.md`` is made from them.
"""

from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from dist_peft.core.config.adapter import (
    AdaLoraConfig,
    AdapterConfig,
    BottleneckConfig,
    FullConfig,
    FusionConfig,
    Ia3Config,
    LinearsConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    LowRankConfig,
    NoAdapterConfig,
    PartialConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QaLoraConfig,
    UnfreezeConfig,
    VeraConfig,
    VirtualTokensConfig,
)
from dist_peft.core.config.adapter_checks import (
    check_adapter_options,
    check_through_quantizer,
    check_through_start,
)
from dist_peft.core.config.data import DataConfig, DataSource
from dist_peft.core.config.domain_adversarial import DomainAdversarialConfig, check_domains
from dist_peft.core.config.engine import EngineConfig
from dist_peft.core.config.environment import Reference, store_references
from dist_peft.core.config.evaluation_checks import check_evaluation_options
from dist_peft.core.config.exact_checks import check_exact_options
from dist_peft.core.config.quantization import QuantConfig
from dist_peft.core.config.scheduled_sampling import ScheduledSamplingConfig, check_sampled_data
from dist_peft.core.config.sweep import HalvingConfig, SweepConfig, SweepPoint
from dist_peft.core.config.sweep_checks import check_sweep_options
from dist_peft.core.config.through_options import ThroughStart
from dist_peft.core.config.types import Beta, ConfigSection, Count, Float, Int, PathText

__all__ = [
    "AdaLoraConfig",
    "AdapterConfig",
    "BaseConfig",
    "BottleneckConfig",
    "DataConfig",
    "DataSource",
    "DomainAdversarialConfig",
    "EngineConfig",
    "FullConfig",
    "FusionConfig",
    "HalvingConfig",
    "Ia3Config",
    "LinearsConfig",
    "LohaConfig",
    "LokrConfig",
    "LoraConfig",
    "LowRankConfig",
    "NoAdapterConfig",
    "PTuningConfig",
    "PartialConfig",
    "PrefixConfig",
    "PromptConfig",
    "QaLoraConfig",
    "QuantConfig",
    "RunConfig",
    "SaveConfig",
    "ScheduledSamplingConfig",
    "SweepConfig",
    "SweepPoint",
    "TrainConfig",
    "UnfreezeConfig",
    "VeraConfig",
    "VirtualTokensConfig",
]


class BaseConfig(ConfigSection):
    """The frozen base model."""

    path: PathText = Field(description="Hugging Face directory with safetensors, or a hub id.")
    quant: QuantConfig | None = Field(
        default_factory=lambda: QuantConfig(),
        description="Storage of the frozen linears; null: no quantization. Leave it out where "
        "base.path is quantized already: the directory decides.",
    )
    head: Literal["lm", "classifier"] = Field(
        "lm",
        description="lm: language modeling. classifier: one label a record (data of format "
        "classification), for encoders and decoders; its parameters are trained with the adapter.",
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Type of activations, dequantized weights, embeddings, norms and biases.",
    )
    attention: str = Field(
        "auto",
        description="transformers' attn_implementation: sdpa, eager, flash_attention_2, ...; "
        "auto: sdpa where the model has it, else eager.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run code shipped with the base; only as an override on the command line.",
    )
    revision: str | None = Field(None, description="Hub revision; ignored for a directory.")


class TrainConfig(ConfigSection):
    """Steps, batch, optimizer and schedule."""

    tasks: Literal["mixed", "separate"] = Field(
        "mixed",
        description="mixed: one adapter is trained on all of data.train. separate: one after the "
        "other, each source trains an adapter of its own in save.dir/tasks/NAME.",
    )
    steps: Count | None = Field(None, description="Optimizer steps; default: one epoch.")
    epochs: Float | None = Field(None, gt=0, le=1_000_000, description="Instead of steps.")
    micro_batch: Int = Field(1, ge=1, description="Most sequences that a rank computes at a time.")
    global_batch: Int = Field(
        16, ge=1, le=2**20, description="Sequences an optimizer step, over all ranks."
    )
    lr: Float = Field(2e-4, gt=0, description="Peak learning rate.")
    layer_decay: Float = Field(
        1.0,
        gt=0,
        le=1,
        description="Discriminative rates: a block's rate is that of the block above times this; "
        "norm and head after the last block have lr (ULMFiT: 0.385).",
    )
    neftune_alpha: Float = Field(0.0, ge=0, description="NEFTune noise on embeddings; 0: none.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="After warmup.")
    warmup: Float = Field(
        0.03, ge=0, description="Warm-up: a share of the steps below 1, else a number of steps."
    )
    min_lr_ratio: Float = Field(0.0, ge=0, le=1, description="Final over peak learning rate.")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw",
        description="adamw: torch's fused AdamW. The others: bitsandbytes. Paged ones page state "
        "from 1e5 values of a parameter a rank on (CUDA only).",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's betas.")
    eps: Float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: Float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: Float = Field(1.0, ge=0, description="Clip the global norm; 0: no clipping.")
    on_nonfinite: Literal["stop", "skip", "halve"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite makes no update. stop: the run "
        "ends with exit code 1. skip: the next step follows. halve: the same, with half the "
        "learning rate from then on.",
    )
    max_nonfinite: Int = Field(
        10, ge=1, description="skip, halve: most such steps of a run; at one more it ends."
    )
    spike_score: Float = Field(
        6.0,
        ge=0,
        description="Mark a step whose loss is so many robust standard deviations (from median and "
        "MAD of the 64 steps before) above their median; 0: none.",
    )
    seed: Int = Field(0, ge=0, lt=2**63, description="Initialization, data order, dropout.")
    exact: bool = Field(
        False,
        description="The same adapter, bit for bit, on any number of ranks and every engine: "
        "gradients are summed as integers. Options whose arithmetic depends on ranks are refused.",
    )
    shuffle: bool = Field(True, description="false: sequences in file order.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Adapter arithmetic: bf16 = in base.compute_dtype, fp32 = in float32. "
        "Adapter weights and optimizer state are always float32.",
    )
    scheduled_sampling: ScheduledSamplingConfig | None = Field(None, description="null: none.")
    domain_adversarial: DomainAdversarialConfig | None = Field(
        None, description="Domain-adversarial training; null: domains are not compared."
    )
    eval_every: Int = Field(0, ge=0, description="Steps between evaluations; 0: start and end.")
    samples: Int = Field(2, ge=0, le=64, description="Prompts continued in reports; 0: none.")
    early_stop: Int = Field(
        0,
        ge=0,
        description="Stop after so many evaluations without a better metric_for_best; 0: never.",
    )
    metric_for_best: Literal["loss", "accuracy", "macro_f1", "matthews", "f1"] = Field(
        "loss",
        description="Held-out metric that early_stop and save.keep_best compare: the loss (lower "
        "is better), or with base.head classifier a score (higher is better; f1: of the only "
        "task's data.train[].positive_label).",
    )
    check_every: Int = Field(
        100, ge=0, description="Steps between checks that ranks hold equal copies; 0: no checks."
    )
    log_every: Int = Field(1, ge=1, description="Steps between lines on the terminal and log.txt.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where present.")

    @model_validator(mode="after")
    def _check_train_options(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give train.steps or train.epochs, not both")
        return self


class SaveConfig(ConfigSection):
    """Run directory and checkpoints."""

    dir: PathText = Field("runs/default", description="Run directory.")
    every: Int = Field(100, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: Int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_best: bool = Field(
        False,
        description="Also save and keep the checkpoint of the best evaluation "
        "(train.metric_for_best), whenever an evaluation (train.eval_every) finds one.",
    )
    asynchronous: bool = Field(
        True,
        description="Write checkpoints in a thread: a step waits for the copy of the rank's own "
        "shard to CPU memory only. false: it waits until the checkpoint is on the disk.",
    )
    track: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        [], description="Experiment trackers that get each step's metrics; see train/trackers.py."
    )


class RunConfig(ConfigSection):
    """A whole run. Every key has a default but ``base.path`` and ``data.train``."""

    base: BaseConfig
    adapter: AdapterConfig = Field(default_factory=lambda: LoraConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    data: DataConfig
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    save: SaveConfig = Field(default_factory=lambda: SaveConfig())
    sweep: SweepConfig | None = Field(None, description="Several adapters at once; null: one.")
    resume: PathText = Field("auto", description="auto: newest in save.dir, if any; never; a path.")

    _references: dict[str, tuple[Reference, object]] = PrivateAttr(default_factory=dict)
    """By key, the text of each value that comes from the environment, and the value."""

    def with_references(self, located: dict[str, tuple[Reference, object]]) -> Self:
        """Return this configuration, to be stored with references (``core.config.environment``)."""
        copied = self.model_copy()
        copied._references = located
        return copied

    def dump_stored_tree(self, *, with_digests: bool = False) -> dict[str, Any]:
        """Return the configuration as plain JSON to be stored or sent: with references in the place
        of values of the environment, and known secrets masked.

        Args:
            with_digests: for comparisons; see ``environment.store_references``.
        """
        tree: dict[str, Any] = store_references(
            self.model_dump(mode="json"), self._references, with_digests=with_digests
        )
        return tree

    @model_validator(mode="before")
    @classmethod
    def _fill_default_kind(cls, value: Any) -> Any:
        """Read an adapter section without ``kind`` as the default adapter's."""
        if isinstance(value, dict) and isinstance(value.get("adapter"), dict):
            value = {**value, "adapter": {"kind": "lora", **value["adapter"]}}
        return value

    @model_validator(mode="after")
    def _check_evaluations(self) -> Self:
        selects = {"save.keep_best": self.save.keep_best, "train.early_stop": self.train.early_stop}
        has_evaluations = bool(self.data.held_out and self.train.eval_every)
        check_evaluation_options(selects, self.train.metric_for_best, self.data, has_evaluations)
        return self

    def check_start(self, start: ThroughStart) -> None:
        """Check that a run can begin with ``start``; raises ValueError if not."""
        selects = self.save.keep_best or bool(self.train.early_stop)
        check_through_start(start, selects, self.train.tasks)

    def _check_exact(self) -> None:
        values = {
            "adapter.kind": self.adapter.kind,
            "adapter.init": getattr(self.adapter, "init", "default"),
            "base.attention": self.base.attention,
            "engine.shard_group": self.engine.shard_group,
            "engine.cpu_offload": self.engine.cpu_offload,
            "engine.gather_experts": self.engine.gather_experts,
            "engine.kernels": self.engine.kernels,
            "engine.deepspeed_config": self.engine.deepspeed_config,
            "train.optimizer": self.train.optimizer,
            "train.domain_adversarial": self.train.domain_adversarial,
        }
        check_exact_options(values)

    @model_validator(mode="after")
    def _check_head_adapter(self) -> Self:
        classifies = self.base.head == "classifier"
        if classifies != self.data.is_classification:
            raise ValueError(
                "base.head classifier goes with data of format: classification, and "
                f"{'the sources have another' if classifies else 'base.head is lm'}"
            )
        check_domains(self.data, self.train.domain_adversarial)
        solver = "rtn" if self.base.quant is None else self.base.quant.solver
        check_adapter_options(self.adapter, solver, self.train.layer_decay)
        check_through_quantizer(self.adapter, self.base.quant, self.base.model_fields_set)
        if isinstance(self.adapter, LoraConfig):
            self.check_start(self.adapter.through_start)
        if self.train.exact:
            self._check_exact()
        if self.sweep is not None:
            check_sweep_options(self.sweep, self, self.train.eval_every, bool(self.data.held_out))
        if self.train.scheduled_sampling is not None:
            check_sampled_data(self.data)
        if classifies and self.base.quant is not None and self.base.quant.embeddings:
            raise ValueError(
                "base.quant.embeddings packs the output head, which base.head classifier trains; "
                "leave it out"
            )
        if classifies and isinstance(self.adapter, VirtualTokensConfig):
            raise ValueError(
                f"adapter.kind {self.adapter.kind} puts virtual tokens before a language model's "
                "input; with base.head classifier use lora, qalora, ia3, bottleneck, fusion, "
                "partial or full"
            )
        return self
