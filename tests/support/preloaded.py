"""Modules that the server of ``tests.support.dist`` imports: forked ranks find them loaded.

Nothing here may start a thread, which a forked process would lack.
"""

import contextlib
import gc

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama  # noqa: F401

import dist_peft.export.formats.gguf_model  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a forked process would copy every page that holds an object
