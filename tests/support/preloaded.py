"""What the server of ``tests.support.dist`` has done before it forks: forked ranks find modules
loaded, and a tiny run's caches (of probes, of source, of torch's fake tensors) filled.

Nothing here may leave a thread, which a forked process would lack.
"""

import contextlib
import gc
import importlib
import os
import random
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401

import dist_peft.export.formats.gguf_model  # noqa: F401
import tests.support.forked_commands  # noqa: F401
from dist_peft.app.cli import COMMANDS
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.log import close_log
from dist_peft.model.skeleton import build_skeleton
from tests.support.curves import skip_curves
from tests.support.shared_files import locate_shared_data
from tests.support.tiny_runs import tiny_tree, train

for name in COMMANDS:
    importlib.import_module(f"dist_peft.app.commands.{name}")
with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401


def train_tiny_runs() -> None:
    """Two runs of one process; the state of random numbers is as before."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with (
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory() as directory,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
        skip_curves(),
    ):
        for kind in ("nf4", None):
            root = Path(directory, str(kind))
            root.mkdir()
            assert train(tiny_tree(root, base__quant=kind and {"kind": kind})) == 0
            close_log()
    random.setstate(state)
    np.random.set_state(numpy_state)


def build_story_skeletons() -> None:
    """Most ranks train stories260K: its forward is tried once here, not in each of them."""
    directory = locate_shared_data() / "stories260K-hf"
    if directory.is_dir():
        for quant in (QuantConfig(kind="nf4"), None):
            base = BaseConfig(path=str(directory), quant=quant, compute_dtype="float32")
            build_skeleton(base, directory)


torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread that watches progress bars
train_tiny_runs()
build_story_skeletons()
assert threading.active_count() == 1, threading.enumerate()
gc.collect()
gc.freeze()  # a collection in a forked process would copy every page that holds an object
