"""A training by hand: counts of targets, logits, hooks."""

from pathlib import Path

import pytest
import torch

from dist_peft import attach, load
from tests.support.tiny_runs import tiny_tree

pytestmark = pytest.mark.e2e


def test_targets_are_counted_and_logits_change_with_steps(tmp_path: Path) -> None:
    with load(tiny_tree(tmp_path)) as base, attach(base) as model:
        batches, targets = model.load_batches(0)
        counted = model.forward_backward(batches)
        model.optim_step(lr=0.0)
        assert counted == model.forward_backward(batches, targets)  # nothing was updated
        ids = batches[0].input_ids
        before = model.compute_logits(ids)
        assert before.shape == (*ids.shape, 97) and before.dtype == torch.float32
        model.optim_step(lr=1e-2)
        assert model.num_steps == 2
        assert not torch.equal(model.compute_logits(ids), before)
        assert torch.equal(model.probe.compute_base_logits(), model.untrained_logits)


def test_closing_removes_the_hooks(tmp_path: Path) -> None:
    def count_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in modules)

    with load(tiny_tree(tmp_path)) as base, attach(base) as model:
        modules = list(model.built.model.modules())
        before = count_hooks()
        model.forward_backward(*model.load_batches(0))
        assert count_hooks() > before
        model.close()
        assert count_hooks() == before
