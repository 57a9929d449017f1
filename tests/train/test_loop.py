"""What an optimizer step means: the mean over its target tokens, and nothing done when broken."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.adapters.method_table import NoAdapter
from dist_peft.adapters.protocol import Adapter
from dist_peft.core.config.run import BaseConfig, LoraConfig, ScheduledSamplingConfig, TrainConfig
from dist_peft.core.errors import RunFailure
from dist_peft.core.world import World
from dist_peft.data.loader import Batch, Loader
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader
from dist_peft.train.loop import TrainingStep
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.predicted_inputs import ScheduledSampling
from tests.support.row_sets import UnevenRows, make_loader
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.training_steps import StepResult, run_training_steps

CPU = torch.device("cpu")
ROWS = UnevenRows([1, 9, 3, 14, 2, 7, 5, 11])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model(CONFIGS["llama"], directory)
    return directory


class Run:
    """A tiny LoRA run in float32."""

    def __init__(self, directory: Path) -> None:
        base = BaseConfig(path=str(directory), quant=None, compute_dtype="float32")
        skeleton = build_skeleton(base, directory)
        self.model = skeleton.model
        self.adapter: Adapter = LoraAdapter(LoraConfig(r=4), seed=0, arithmetic=torch.float32)
        self.adapter.attach_to_model(self.model)
        self.engine = SingleEngine(CPU)
        self.engine.shard_model(self.model, skeleton.blocks)
        with RowReader(skeleton.index) as reader:
            load_model(self.model, reader, self.engine, CPU)
        factory = make_optimizer_factory(TrainConfig(), CPU)
        self.engine.setup_optimizer(self.model, factory, self.adapter.get_lr_scale)
        self.results: list[StepResult] = []
        self.sampling: ScheduledSampling | None = None

    def fit(self, loader: Loader[Batch], first: int = 0, last: int = 2) -> None:
        part = TrainingStep(
            self.model,
            self.model,
            self.engine,
            self.adapter,
            TokenObjective(),
            World(),
            sampling=self.sampling,
        )
        self.results += run_training_steps(
            part, loader, range(first, last), lambda step: 0.01 / (step + 1)
        )

    def learned(self) -> dict[str, Tensor]:
        return {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
        }


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_matter(micro: int, llama: Path) -> None:
    """A mean of the micro-batches' means would differ: the rows have 1 to 14 targets."""
    whole, cut = Run(llama), Run(llama)
    start = whole.learned()
    whole.fit(make_loader(ROWS, 4, micro=4))
    cut.fit(make_loader(ROWS, 4, micro=micro))
    assert [r.tokens for r in cut.results] == [27, 25]
    for a, b in zip(whole.results, cut.results, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    for name, value in whole.learned().items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(cut.learned()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_loss_is_the_mean_over_all_targets(llama: Path) -> None:
    run = Run(llama)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(4):
            tokens, labels, _ = ROWS.get_sequence(index)
            logits = run.model(input_ids=tokens[None]).logits[0].double()
            total += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    run.fit(make_loader(ROWS, 4, micro=2), last=1)
    (result,) = run.results
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert (result.step, result.tokens) == (1, count)


def test_gold_inputs_give_the_same_bits(llama: Path) -> None:
    """Scheduled sampling with eps = 1; below, the gradient is another."""
    runs = [Run(llama) for _ in range(3)]
    runs[1].sampling = ScheduledSampling(ScheduledSamplingConfig(c=0), seed=0)
    runs[2].sampling = ScheduledSampling(ScheduledSamplingConfig(c=0, k=0), seed=0)
    for run in runs:
        run.fit(make_loader(ROWS, 4, micro=2))
    without, gold, predicted = runs
    assert gold.results == without.results
    for name, value in without.learned().items():
        assert torch.equal(gold.learned()[name], value), name
    assert predicted.results[0].loss != gold.results[0].loss


def test_steps_do_not_depend_on_where_training_stopped(llama: Path) -> None:
    through, parts = Run(llama), Run(llama)
    loader = make_loader(ROWS, 4, micro=2)
    through.fit(loader, 0, 4)
    parts.fit(loader, 0, 2)
    parts.fit(loader, 2, 4)
    assert [r.step for r in parts.results] == [1, 2, 3, 4]
    assert [r.loss for r in parts.results] == [r.loss for r in through.results]
    for name, value in through.learned().items():
        assert torch.equal(parts.learned()[name], value), name


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_is_not_made(
    where: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(llama)
    loader = make_loader(ROWS, 4, micro=2)
    run.fit(loader, 0, 1)
    before = {
        key: value.clone() for key, value in run.engine.training_state_dict(run.model).items()
    }

    real = TokenObjective.compute_loss

    def broken(*args: Any) -> Tensor:
        loss = real(*args)
        if where == "loss":
            return loss * math.nan
        return loss.detach() + (loss - loss.detach()).abs().sqrt()  # slope at 0: infinite

    monkeypatch.setattr(TokenObjective, "compute_loss", broken)
    run.fit(loader, 1, 2)
    after = run.engine.training_state_dict(run.model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [math.isfinite(r.grad_norm) for r in run.results] == [True, False]
    assert math.isfinite(run.results[1].loss) == (where == "gradient")
    monkeypatch.undo()
    run.fit(loader, 2, 3)  # no gradient of the step before is left
    assert math.isfinite(run.results[2].grad_norm)


def test_update_that_the_loss_contradicts_ends_the_run(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(llama)
    monkeypatch.setattr(run.engine, "step", lambda lr, max_norm: 1.0)
    part = TrainingStep(run.model, run.model, run.engine, run.adapter, TokenObjective(), World())
    with pytest.raises(RunFailure, match=r"step 3: the loss is inf .* does not show it"):
        part.update_parameters(2, math.inf, 1e-3, 1.0)


def test_adapter_hears_of_every_micro_batch(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, heard = Run(llama), list[tuple[int, list[int]]]()
    monkeypatch.setattr(run, "adapter", NoAdapter())
    monkeypatch.setattr(
        run.adapter, "begin_micro_batch", lambda step, ids: heard.append((step, ids.tolist()))
    )
    run.fit(make_loader(ROWS, 4, micro=2), 1, 3)
    assert heard == [(1, [4, 5]), (1, [6, 7]), (2, [0, 1]), (2, [2, 3])]
