"""Section ``engine``: how the base, the optimizer state and activations are kept."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.types import ConfigSection, Count, Float, Int, PathText

__all__ = ["EngineConfig"]


class EngineConfig(ConfigSection):
    """How the base and the optimizer state are sharded."""

    kind: Literal["auto", "single", "fsdp2", "zero"] = Field(
        "auto",
        description="auto: single with one process, zero under the deepspeed launcher, else fsdp2.",
    )
    stage: Literal[1, 2, 3] = Field(
        3,
        description="zero: DeepSpeed's ZeRO stage for adapters. 1 shards their optimizer state, 2 "
        "gradients too, 3 the adapters too. The base is sharded in every stage (shard_base).",
    )
    deepspeed_config: PathText | None = Field(
        None,
        description="zero: DeepSpeed JSON file to take further settings from (buckets, overlap, "
        "logging); settings that contradict this configuration are refused.",
    )
    shard_base: bool = Field(
        True, description="false: every rank keeps the whole packed base (small bases)."
    )
    shard_group: Literal["all", "node"] | Count = Field(
        "all",
        description="all: shard over all ranks. node or a number of ranks: shard inside groups "
        "of that size and replicate across them (HSDP).",
    )
    keep_gathered: Int = Field(
        0,
        ge=0,
        description="Number of blocks, from the first on, that stay gathered over the "
        "micro-batches of a step (fsdp2) or for good (zero), instead of being gathered twice a "
        "micro-batch; each takes a whole block of memory. dist-peft plan --search proposes how "
        "many fit.",
    )
    gather_experts: Literal["all", "routed", "tokens"] = Field(
        "all",
        description="Mixtures of experts on several ranks. all: a block's experts are gathered "
        "with it. routed: after the router, those that tokens of any rank were routed to, which "
        "saves bytes where all ranks together have few tokens. tokens: a rank keeps whole experts, "
        "and tokens travel to them (expert parallelism); the same losses to rounding. dist-peft "
        "plan counts all three.",
    )
    reduce_gradients: Literal["micro_batch", "step"] = Field(
        "micro_batch",
        description="fsdp2: micro_batch: sum the adapters' gradients over ranks after each "
        "micro-batch; a rank keeps its share of them. step: once a step; every rank keeps whole "
        "float32 gradients until then, and sends less.",
    )
    activation_checkpointing: bool = Field(
        True,
        description="Activation checkpointing: keep each block's input, recompute the rest in "
        "backward.",
    )
    keep_results: Literal["none", "attention", "products"] = Field(
        "none",
        description="With activation_checkpointing: results of a block that are kept next to its "
        "input and not computed again in backward. attention: of attention and of low-rank inner "
        "products; products: of frozen linears too, whose weights are then decoded once less. The "
        "same bits.",
    )
    share_decodes: bool = Field(
        False,
        description="With activation_checkpointing: a frozen weight that recomputation has decoded "
        "is kept for the block's backward, so that two decodes of three are left. Holds the "
        "decoded frozen weights of one block, experts included. The same bits.",
    )
    offload_inputs: bool = Field(
        False,
        description="With activation_checkpointing: blocks' inputs rest in pinned host memory from "
        "forward to backward (CUDA only).",
    )
    kernels: Literal["own", "liger"] = Field(
        "own",
        description="liger: RMSNorm, SwiGLU, rotary positions and the loss of a frozen head by the "
        "kernels of the package liger-kernel, where a model has their form (CUDA only).",
    )
    cpu_offload: Literal["none", "params", "optimizer"] = Field(
        "none",
        description="params (fsdp2): shards and optimizer state stay in host memory (CUDA only). "
        "optimizer (zero): optimizer state is kept and updated in host memory (ZeRO-Offload).",
    )
    start_timeout_minutes: Float = Field(
        10.0, gt=0, le=30_000, description="Rendezvous timeout at the start."
    )
    timeout_minutes: Float = Field(
        30.0, gt=0, le=30_000, description="Timeout of a collective; the run ends after it."
    )
    stall_seconds: Float = Field(
        300.0,
        ge=0,
        description="The longest time without progress in a training step: then every rank names "
        "the one that stands still, and exits. Loading, evaluation, GPTQ and checkpoints have "
        "multiples of it for each of their pieces of work. 0: no limit.",
    )

    @model_validator(mode="after")
    def _check_share_decodes(self) -> Self:
        if self.share_decodes and not self.activation_checkpointing:
            raise ValueError(
                "share_decodes is for activation_checkpointing: true; without it nothing is "
                "recomputed, and a weight is decoded once in backward"
            )
        if self.share_decodes and self.keep_results == "products":
            raise ValueError(
                "share_decodes contradicts keep_results: products, with which recomputation "
                "decodes nothing; set share_decodes: false or keep_results: attention"
            )
        return self

    @model_validator(mode="after")
    def _check_gathered_experts(self) -> Self:
        if self.gather_experts == "routed" and self.keep_gathered:
            raise ValueError(
                "gather_experts: routed gathers experts for each micro-batch, and keep_gathered "
                "keeps whole blocks; leave one of them out"
            )
        if self.gather_experts == "tokens" and self.keep_gathered:
            raise ValueError(
                "gather_experts: tokens gathers no experts, which keep_gathered would keep whole; "
                "leave one of them out"
            )
        if self.gather_experts == "tokens" and self.cpu_offload == "params":
            raise ValueError(
                "gather_experts: tokens multiplies experts where they rest, and cpu_offload: "
                "params has them rest in host memory; leave one of them out"
            )
        return self
