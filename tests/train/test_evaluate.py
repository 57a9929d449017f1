"""Held-out loss against a dense computation, and the model left as it was."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional

from dist_peft.core.world import World
from dist_peft.engine.single import SingleEngine
from dist_peft.train.evaluate import evaluate, inference
from tests.dist import run_ranks
from tests.tiny_models import CONFIGS
from tests.train.rows import UnevenRows, make_loader

CPU = torch.device("cpu")
ROWS = UnevenRows([1, 9, 3, 14, 2])


def tiny_model() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(CONFIGS["llama"])


def dense_loss(model: nn.Module) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(ROWS)):
            tokens, labels, _ = ROWS.row(index)
            logits = model(input_ids=tokens[None]).logits[0].double()
            total += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert count == sum(ROWS.counts)
    return total / count


def _evaluate(world: World, micro: int) -> float:
    loader = make_loader(ROWS, 4, micro, world.rank, world.size)
    return evaluate(tiny_model(), SingleEngine(CPU), loader, world).loss


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_mean_over_all_targets_of_all_rows(micro: int) -> None:
    assert _evaluate(World(), micro) == pytest.approx(dense_loss(tiny_model()), rel=1e-6)


@pytest.mark.dist
def test_ranks_agree_though_their_shares_differ() -> None:
    """Five rows on two ranks: one rank has a filler row, which counts for nothing."""
    first, second = run_ranks(_evaluate, 2, 2)
    assert first == second == pytest.approx(dense_loss(tiny_model()), rel=1e-6)


class TestInference:
    def model(self) -> nn.Sequential:
        model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)))
        model.train()
        model[1].eval()  # the frozen base is in evaluation mode all along
        model[1][0].train()  # an adapter's dropout inside it is not
        return model

    def test_no_dropout_no_gradients(self) -> None:
        model, x = self.model(), torch.ones(3, 4)
        with inference(model):
            assert not any(module.training for module in model.modules())
            y = model(x)
        assert torch.equal(y, model[1][1](x)) and not y.requires_grad

    def test_flags_come_back_after_an_error_too(self) -> None:
        model = self.model()
        before = [module.training for module in model.modules()]
        assert True in before and False in before
        with inference(model):
            pass
        assert [module.training for module in model.modules()] == before
        with pytest.raises(RuntimeError, match="broken"), inference(model):
            raise RuntimeError("broken")
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
