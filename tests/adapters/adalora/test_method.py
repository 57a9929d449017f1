"""PEFT's ``AdaLoraModel``, trained next to this one from the same values, is the reference."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.adalora.method import AdaLoraAdapter
from dist_peft.core.config.run import AdaLoraConfig, TrainConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.single import SingleEngine
from dist_peft.train.importance import EngineParameters, ImportanceFactory
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.adapters import adapted, ids, tiny_llama

CPU = torch.device("cpu")
STEPS, LR = 8, 1e-2
TRAIN = TrainConfig(weight_decay=0.0)
SETTINGS: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())


def trained_here() -> tuple[dict[str, Tensor], list[dict[str, list[bool]]], list[Tensor]]:
    """(initial values, which E are not zero after each step, last values)"""
    model, adapter = adapted(tiny_llama(), method=AdaLoraConfig, alpha=8.0, delta_t=2, **SETTINGS)
    assert isinstance(adapter, AdaLoraAdapter)
    adapter.plan_steps(STEPS)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    engine = SingleEngine(CPU)
    factory = ImportanceFactory(make_optimizer_factory(TRAIN, CPU), adapter.get_importance_rule())
    engine.setup_optimizer(model, factory, adapter.get_lr_scale)
    masks = []
    for step in range(STEPS):
        adapter.begin_micro_batch(step, torch.arange(2))
        loss = loss_of(model(ids()).logits)
        adapter.add_penalty_gradient(loss, 1)
        engine.backward(loss, last=True)
        engine.step(LR, 0.0)
        adapter.finish_step(step + 1, EngineParameters(model, engine))
        masks.append({p: (m.lora_E != 0).tolist() for p, m in adapter.layers.items()})
    return start, masks, [m.lora_E.detach().clone() for m in adapter.layers.values()]


def trained_by_peft(
    start: dict[str, Tensor],
) -> tuple[list[dict[str, list[bool]]], list[Tensor]]:
    # without a task type PEFT leaves the penalty out
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        lora_alpha=8,
        deltaT=2,
        total_step=STEPS,
        target_modules="all-linear",
        **SETTINGS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(tiny_llama()), config).eval()
    for name, value in start.items():
        own = model.get_parameter(f"base_model.model.{name}.default")
        own.data.copy_(value.view_as(own))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=LR, betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=0.0, fused=True
    )
    paths = [name.removesuffix(".lora_E") for name in start if name.endswith("lora_E")]

    def numbers() -> dict[str, Tensor]:
        return {
            path: model.get_parameter(f"base_model.model.{path}.lora_E.default").detach()[:, 0]
            for path in paths
        }

    masks = []
    for step in range(1, STEPS + 1):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        masks.append({path: (value != 0).tolist() for path, value in numbers().items()})
    return masks, [value.clone() for value in numbers().values()]


def test_the_same_triplets_at_the_same_steps_as_peft() -> None:
    start, masks, last = trained_here()
    expected, expected_last = trained_by_peft(start)
    assert masks == expected
    counts = [sum(sum(own) for own in step.values()) for step in masks]
    assert counts[0] == 56 and counts[1] < 56 and counts[5:] == [28, 28, 28]
    for found, wanted in zip(last, expected_last, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapter\.init_r of at most 16 in .*k_proj"):
        adapted(tiny_llama(), method=AdaLoraConfig, init_r=17)
    _, adapter = adapted(tiny_llama(), method=AdaLoraConfig, tinit=3, tfinal=4)
    with pytest.raises(UserError, match=r"tinit 3 and adapter\.tfinal 4 leave none of the 7 steps"):
        adapter.plan_steps(7)
    with pytest.raises(ValueError, match="target_r 13 is more than init_r 12"):
        AdaLoraConfig(target_r=13)
