"""What the server of ``tests.support.dist`` imports beside the trainer, where it is installed."""

import contextlib

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
