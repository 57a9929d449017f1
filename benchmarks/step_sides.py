"""The sides that ``step_vs_peft.py`` compares: the project, PEFT's plain loop, Trainer, TRL.

Each ``build_*`` returns a model and a function that runs some optimizer steps and times them.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    run_config,
)
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.quant import kernels
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory

LR = 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

StepRound = Callable[[int], tuple[list[float], list[float]]]
"""Steps -> (loss, seconds) of each, the first of them not to be counted."""


@dataclass(frozen=True)
class Settings:
    """What all sides share; ``rows`` of ``tokens`` each are one optimizer step of all ranks."""

    dtype: str
    double_quant: bool
    checkpointing: bool
    rows: int
    tokens: int
    documents: int


# -- rows ------------------------------------------------------------------------------------------


def make_row(index: int, settings: Settings) -> Batch:
    """Random tokens; rows repeat after one optimizer step, so that the loss falls."""
    generator = torch.Generator().manual_seed(index % settings.rows)
    ids = torch.randint(3, 500, (1, settings.tokens), generator=generator)
    lengths = [len(part) for part in torch.arange(settings.tokens).tensor_split(settings.documents)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids, labels, positions, torch.tensor([index]))


def deal_rows(world: World, settings: Settings) -> list[Batch]:
    """This rank's rows of each step, one a micro-batch."""
    return [make_row(i, settings) for i in range(world.rank, settings.rows, world.size)]


def time_steps(step: Callable[[], float]) -> StepRound:
    def run_round(steps: int) -> tuple[list[float], list[float]]:
        losses, seconds = [], []
        for _ in range(steps + 1):
            before = read_clock()
            losses.append(step())
            seconds.append(read_clock() - before)
        return losses, seconds

    return run_round


def read_clock() -> float:
    """CPU seconds of this process; on CUDA wall seconds after the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# -- sides -----------------------------------------------------------------------------------------


def build_ours(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    config = run_config(
        base,
        base={
            "quant": {"kind": "nf4", "double_quant": settings.double_quant},
            "compute_dtype": settings.dtype,
        },
        engine={
            "kind": "fsdp2" if world.size > 1 else "single",
            "activation_checkpointing": settings.checkpointing,
        },
        train={"lr": LR, "precision": "fp32" if settings.dtype == "float32" else "bf16"},
    )
    built = load_weights(build_model(resolve_config(config)), world, DEVICE)
    adapter = built.setup.adapter
    call = built.engine.setup_optimizer(
        built.model, make_optimizer_factory(config.train, DEVICE), adapter.get_lr_scale
    )
    part = TrainingStep(built.model, call, built.engine, adapter, TokenObjective(), world)
    rows = deal_rows(world, settings)
    targets = settings.rows * (settings.tokens - settings.documents)
    numbers = itertools.count()
    # bitsandbytes' operator is tried now, as after the first ten seconds of decoding of a run
    kernels._decoded.count = kernels.TRIAL_WEIGHTS

    def step() -> float:
        number = next(numbers)
        loss = part.accumulate_gradients(number, rows, targets)
        part.update_parameters(number, loss, LR, 1.0)
        return float(loss)

    return built.model, time_steps(step)


def build_peft(base: Path, settings: Settings) -> Any:
    dtype = getattr(torch, settings.dtype)
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quant, device_map={"": DEVICE.type}
    )
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def build_plain(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    model = build_peft(base, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    call = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    rows = deal_rows(world, settings)
    targets = settings.rows * (settings.tokens - settings.documents)

    def step() -> float:
        total = 0.0
        for index, row in enumerate(rows):
            if world.size > 1:
                call.require_backward_grad_sync = index == len(rows) - 1
            logits = call(input_ids=row.input_ids.to(DEVICE), use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            labels = row.labels.to(DEVICE).flatten()
            # DistributedDataParallel averages over ranks
            loss = functional.cross_entropy(flat, labels, reduction="sum") / targets * world.size
            loss.backward()
            total += float(loss.detach()) / world.size
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return model, time_steps(step)


class _StepClock(TrainerCallback):  # type: ignore[misc]
    """Reads the clock at the end of each step."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.readings.append(read_clock())


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Trainer's rows: it deals them to the ranks itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return 1000 * self.settings.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = make_row(index, self.settings)
        # Trainer's models shift the labels themselves
        return {"input_ids": row.input_ids[0], "labels": row.labels[0].roll(1)}


def make_trainer_arguments(world: World, settings: Settings) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.rows // world.size,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": settings.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": DEVICE.type == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }


def build_trainer(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    model = build_peft(base, settings)

    def make_trainer(steps: int, clock: _StepClock) -> Trainer:
        args = TrainingArguments(**make_trainer_arguments(world, settings), max_steps=steps)
        return Trainer(model=model, args=args, train_dataset=_Rows(settings), callbacks=[clock])

    return model, time_trainer(make_trainer)


def build_trl(base: Path, world: World, settings: Settings) -> tuple[Any, StepRound]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = build_peft(base, settings)
    rows = _Rows(settings)
    listed = [{k: v.tolist() for k, v in rows[i].items()} for i in range(settings.rows)]

    def make_trainer(steps: int, clock: _StepClock) -> Any:
        arguments = make_trainer_arguments(world, settings)
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        config = SFTConfig(**arguments, max_steps=steps, **options)
        dataset = Dataset.from_list(listed * (steps + 1))
        return SFTTrainer(model=model, args=config, train_dataset=dataset, callbacks=[clock])

    return model, time_trainer(make_trainer)


def time_trainer(make_trainer: Callable[[int, _StepClock], Any]) -> StepRound:
    def run_round(steps: int) -> tuple[list[float], list[float]]:
        clock = _StepClock()
        result = make_trainer(steps + 1, clock).train()
        seconds = [b - a for a, b in itertools.pairwise(clock.readings)]
        # one loss is Trainer's mean of all steps: the rounds are compared by their times alone
        return [result.training_loss], [0.0, *seconds]

    return run_round


SIDES = {
    "dist_peft": build_ours,
    "plain": build_plain,
    "trainer": build_trainer,
    "trl": build_trl,
}


def copy_start(source: Any, target: Any) -> None:
    """Give PEFT's LoRA the start values of ours (one rank: nothing is sharded)."""
    start = {n: p.detach() for n, p in source.named_parameters() if p.requires_grad}
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(start.pop(own))
    assert not start, f"without a partner: {list(start)[:3]}"
