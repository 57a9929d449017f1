"""The reference engine: everything is here, nothing moves."""

import pytest
import torch
from torch import nn

from dist_peft.core.config.run import TrainConfig
from dist_peft.core.span import Span
from dist_peft.engine.engine_protocol import trainable_parameters
from dist_peft.engine.single import SingleEngine
from dist_peft.train.optimizers import make_optimizer_factory

CPU = torch.device("cpu")


def model_on_meta() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 5, device="meta"), nn.Linear(5, 2, device="meta"))
    model[0].requires_grad_(False)
    return model


def filled(engine: SingleEngine) -> nn.Sequential:
    model = model_on_meta()
    engine.shard_model(model, [])
    for index, module in enumerate(model):
        for name, p in list(module.named_parameters(recurse=False)):
            generator = torch.Generator().manual_seed(index)
            engine.fill_local_rows(module, name, torch.randn(p.shape, generator=generator))
    return model


def test_spans_are_whole() -> None:
    engine = SingleEngine(CPU)
    assert [engine.local_row_span(p) for p in model_on_meta().parameters()] == [
        Span(0, 5),
        Span(0, 5),
        Span(0, 2),
        Span(0, 2),
    ]


def test_fill_keeps_rows_and_what_learns() -> None:
    engine, model = SingleEngine(CPU), model_on_meta()
    rows = torch.arange(15.0).view(5, 3)
    engine.fill_local_rows(model[0], "weight", rows)
    engine.fill_local_rows(model[1], "bias", torch.ones(2))
    assert torch.equal(engine.gather_parameter(model[0].weight), rows)
    assert not model[0].weight.requires_grad and model[1].bias.requires_grad
    assert list(trainable_parameters(model)) == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    "rows", [torch.zeros(4, 3), torch.zeros(5, 3, dtype=torch.uint8)], ids=["shape", "dtype"]
)
def test_fill_refuses_what_does_not_fit(rows: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        SingleEngine(CPU).fill_local_rows(model_on_meta()[0], "weight", rows)


def test_micro_batches_add_up_to_one_step_of_plain_adamw() -> None:
    engine = SingleEngine(CPU)
    model, plain = filled(engine), filled(engine)
    engine.setup_optimizer(model, make_optimizer_factory(TrainConfig(), CPU), lambda name: 1.0)
    optimizer = torch.optim.AdamW(plain[1].parameters(), lr=0.1, weight_decay=0.0, fused=True)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        for number, part in enumerate(x.split(2)):
            engine.backward(model(part).square().sum() / 6, last=number == 2)
        engine.step(lr=0.1, max_norm=0.0)
        (plain(x).square().sum() / 6).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(model[0].weight, filled(engine)[0].weight)
    assert engine.bytes_gathered == 0


def test_state_before_optimize_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match=r"optimize\(\) comes first"):
        SingleEngine(CPU).training_state_dict(model_on_meta())
