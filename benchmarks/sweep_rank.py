"""One rank of ``sweep.py``: orders come as JSON lines on stdin, answers leave so on stdout.

A sweep and one of its points as a run alone are loaded into the same process and take turns step by
step. Both train with the parts of the project's own loops: ``AdapterTraining`` and ``JoinedStep``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from common import run_config
from wire_rank import CPU, FORMS, sent, transfer

from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import ModelSetup, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.app.sweep.point_model import make_point_model
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.engine import Engine
from dist_peft.train.joined_step import AdapterWork, JoinedStep
from dist_peft.train.metrics import read_peak_memory_bytes
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory


class Side(Protocol):
    """What is measured."""

    engine: Engine

    def step(self) -> list[float]:
        """Make an optimizer step of each adapter; give their losses."""
        ...


class Alone:
    """A run of one adapter."""

    def __init__(self, config: RunConfig, world: World) -> None:
        setup = build_model(resolve_config(config))
        built = load_weights(setup, world, CPU)
        call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
        loaders = make_data_loaders(config, setup.tokenizer, world)
        self.engine = built.engine
        self.training = AdapterTraining(config, world, built, call, loaders)

    def step(self) -> list[float]:
        batches, targets = self.training.load_batches(self.training.num_steps)
        loss = self.training.forward_backward(batches, targets)
        self.training.optim_step()
        return [loss]


class Sweep:
    """All points at once."""

    def __init__(self, config: RunConfig, world: World) -> None:
        resolved = resolve_config(config)
        setup = build_model(resolved)
        built = load_weights(setup, world, CPU)
        adapter = cast(JoinedAdapter, setup.adapter)
        self.engine, self.trainings = built.engine, list[AdapterTraining]()
        for number, point in enumerate(resolved.split_points().values()):
            own = {"config": point.run, "adapter": adapter.adapters[number]}
            model = make_point_model(
                built, ModelSetup(**{**vars(setup), **own}), number, adapter.shares
            )
            call = model.setup_optimizer(make_optimizer_factory(point.run.train, CPU))
            loaders = make_data_loaders(point.run, setup.tokenizer, world)
            self.trainings.append(AdapterTraining(point.run, world, model, call, loaders))
        objective = cast(TokenObjective, self.trainings[0].loaders.objective)
        self.joined = JoinedStep(
            built.model, built.engine, objective, world, adapter.adapters, adapter.shares
        )

    def step(self) -> list[float]:
        works = {
            number: AdapterWork(training.num_steps, *training.load_batches(training.num_steps))
            for number, training in enumerate(self.trainings)
        }
        found = self.joined.accumulate_gradients(works)
        for number, training in enumerate(self.trainings):
            training.accept_gradients(works[number].batches, *found[number])
            training.optim_step()
        return [losses.mean for losses in found.values()]


def configure(settings: dict[str, Any], world: World, points: int) -> RunConfig:
    """A sweep over rates, or with one point a run."""
    rates = [1e-3 * (1 + n) for n in range(points)]
    sections: dict[str, Any] = {"sweep": {"lr": rates}} if points > 1 else {}
    return run_config(
        Path(settings["base"]),
        base={"quant": FORMS[settings["form"]], "compute_dtype": settings["dtype"]},
        adapter={"r": settings["r"]},
        engine={"kind": "single" if world.size == 1 else "fsdp2"},
        data={
            "train": [settings["data"]],
            "seq_len": settings["seq_len"],
            "cache_dir": settings["cache"],
        },
        train={
            "lr": 1e-3,
            "global_batch": world.size * settings["batch"],
            "micro_batch": settings["batch"],
        },
        **sections,
    )


def measure(side: Side, world: World) -> dict[str, float]:
    """One step between two barriers; whatever it sent has arrived when the second is through."""
    world.barrier()
    wire, processor, clock = count_sent(), time.process_time(), time.perf_counter()
    gathered = side.engine.bytes_gathered
    losses = side.step()
    world.barrier()
    return {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - processor,
        "sent": count_sent() - wire,
        "gathered": side.engine.bytes_gathered - gathered,
        "loss": losses[0],
        "peak": read_peak_memory_bytes(CPU),
    }


def count_sent() -> int:
    """Bytes that left this host so far; 0 without a link."""
    return sent() if Path("/sys/class/net/eth0/statistics").is_dir() and WIRED else 0


WIRED = os.environ.get("WORLD_SIZE", "1") != "1"


def main() -> None:
    # libraries print on stdout; answers keep it for themselves
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    world = World.detect_world()
    if world.size > 1:
        world.join_process_group(CPU, timeout_minutes=5, start_timeout_minutes=3)
    sides: dict[str, Side] = {
        "alone": Alone(configure(settings, world, 1), world),
        "sweep": Sweep(configure(settings, world, settings["points"]), world),
    }
    answers.write(json.dumps({}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        if "transfer" in order:
            answer: Any = transfer(world, order["transfer"])
        else:
            answer = [
                {name: measure(side, world) for name, side in sides.items()}
                for _ in range(order["steps"])
            ]
        answers.write(json.dumps(answer) + "\n")
    if world.size > 1:
        world.leave_process_group()


if __name__ == "__main__":
    main()
