"""One rank of ``wire.py``: orders come as JSON lines on stdin, answers leave so on stdout.

Every form of the base is loaded into the same process, and forms take turns step by step, so that
whatever else the machine does meets all of them.
"""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import run_config
from torch import nn

from dist_peft.app.data_setup import DataLoaders, make_data_loaders
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.quant.codec import RawCodec
from dist_peft.train.loop import TrainingStep
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")
CHUNK = bytearray(2**20)
LR = 1e-3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

FORMS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "nf4": {"kind": "nf4"},
    "routed": {"kind": "nf4"},
    "tokens": {"kind": "nf4"},
    "int8": {"kind": "int", "bits": 8},
    "int4": {"kind": "int", "bits": 4},
    "int3": {"kind": "int", "bits": 3},
    "int2": {"kind": "int", "bits": 2},
}
"""What travels -> ``base.quant``. ``routed``: of experts those that tokens are routed to;
``tokens``: none, their tokens do."""


@dataclass
class Job:
    """A loaded form of the base, and how far its training is."""

    config: RunConfig
    built: LoadedModel
    call: nn.Module
    loaders: DataLoaders
    done: int = 0

    def step(self, world: World) -> float:
        """One step with the parts of the project's own training loop; gives its loss."""
        built, objective = self.built, self.loaders.objective
        part = TrainingStep(
            built.model, self.call, built.engine, built.setup.adapter, objective, world
        )
        batches, targets = self.loaders.train.load_step(self.done)
        loss = part.accumulate_gradients(self.done, batches, targets)
        part.update_parameters(self.done, loss, LR, 1.0)
        self.done += 1
        return loss


def start(settings: dict[str, Any], form: str, world: World) -> Job:
    is_mixture = settings["experts"] > 0
    config = run_config(
        Path(settings["base"]),
        base={"quant": FORMS[form], "compute_dtype": settings["dtype"]},
        adapter={"r": settings["r"], **({"target_modules": ATTENTION} if is_mixture else {})},
        engine={
            "kind": settings["engine"],
            "gather_experts": form if form in ("routed", "tokens") else "all",
        },
        data={
            "train": [settings["data"]],
            "seq_len": settings["seq_len"],
            "cache_dir": settings["cache"],
        },
        train={"global_batch": world.size * settings["batch"], "micro_batch": settings["batch"]},
    )
    prepared = build_model(resolve_config(config))
    if form == "bf16":
        store_as_bf16(prepared.model)
    loaders = make_data_loaders(config, prepared.tokenizer, world)
    built = load_weights(prepared, world, CPU)
    factory = make_optimizer_factory(config.train, CPU)
    call = built.engine.setup_optimizer(built.model, factory, built.setup.adapter.get_lr_scale)
    return Job(config, built, call, loaders)


def store_as_bf16(model: nn.Module) -> None:
    """The blocks' linears rest and travel in bf16, whatever the run computes in."""
    codec = RawCodec(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, FrozenLinear) and not module.is_head:
            shape = (module.out_features, codec.num_row_bytes(module.in_features))
            module.codec = codec
            module.packed = nn.Parameter(
                torch.empty(shape, dtype=torch.uint8, device="meta"), False
            )


def sent() -> int:
    """Bytes that left this host so far."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def measure(job: Job, world: World) -> dict[str, float]:
    """One step between two barriers; whatever it sent has arrived when the second is through."""
    world.barrier()
    wire, processor, clock = sent(), time.process_time(), time.perf_counter()
    gathered = job.built.engine.bytes_gathered
    loss = job.step(world)
    world.barrier()
    return {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - processor,
        "sent": sent() - wire,
        "gathered": job.built.engine.bytes_gathered - gathered,
        "loss": loss,
    }


def transfer(world: World, seconds: float, port: int = 29600) -> float:
    """Gbit/s of a plain TCP stream from rank 0 to rank 1 (the others wait)."""
    rate = 0.0
    if world.rank == 1:
        with socket.create_server(("", port)) as server:
            world.barrier()
            connection, _ = server.accept()
            with connection:
                rate = _receive(connection)
    else:
        world.barrier()
        if world.rank == 0:
            address = os.environ["RANK_1_ADDRESS"]
            with socket.create_connection((address, port)) as connection:
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    connection.sendall(CHUNK)
    return world.sum_over_ranks(rate)[0]


def _receive(connection: socket.socket) -> float:
    """Gbit/s of what comes until the sender closes."""
    total, begin = 0, time.perf_counter()
    while count := connection.recv_into(CHUNK):
        total += count
    return total * 8e-9 / (time.perf_counter() - begin)


def main() -> None:
    # libraries print on stdout; answers keep it for themselves
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    world = World.detect_world()
    world.join_process_group(CPU, timeout_minutes=5, start_timeout_minutes=3)
    jobs = {form: start(settings, form, world) for form in settings["forms"]}
    answers.write(json.dumps({f: job.built.stored_bytes for f, job in jobs.items()}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        if "transfer" in order:
            answer: Any = transfer(world, order["transfer"])
        else:
            answer = [
                {form: measure(job, world) for form, job in jobs.items()}
                for _ in range(order["steps"])
            ]
        answers.write(json.dumps(answer) + "\n")
    world.leave_process_group()


if __name__ == "__main__":
    main()
