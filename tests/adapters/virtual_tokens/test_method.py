"""Virtual tokens in every family: as in PEFT, in packed rows, and in generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.virtual_tokens import method as virtual
from dist_peft.core.config.run import PTuningConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.activation_checkpointing import checkpoint_block_activations
from dist_peft.model.attention_mask import build_model_inputs, documents_are_isolated
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.virtual_tokens import METHODS, attach, load, pair, random_ids

CASES = [
    *(("prefix", family) for family in CONFIGS),
    *(("prompt", family) for family in ("llama", "mistral", "gemma3", "opt", "gpt_neox")),
    ("ptuning", "llama-tied-bias"),
]

POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0]]
)
DOCUMENTS = [(0, 0, 5), (0, 5, 12), (1, 0, 9), (1, 9, 11), (1, 11, 12)]
"""Row, start and stop of what POSITIONS pack; one is longer than the sliding windows."""


def logits(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    if positions is None:
        return model(input_ids=ids, use_cache=False).logits
    return model(**build_model_inputs(model, ids, positions), use_cache=False).logits


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=8,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )[:, ids.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), CASES)
def test_family(method: str, family: str, tmp_path: Path) -> None:
    ours, peft = pair(method, family, tmp_path)
    ids = random_ids(2, 12)

    # the deployed artifact gives PEFT the same logits, and they are not the base's
    found = logits(ours, ids)
    torch.testing.assert_close(found, peft(input_ids=ids).logits[:, -12:], rtol=0, atol=1e-6)
    assert (found - logits(load(tmp_path / "base"), ids)).abs().max() > 0.02

    # packed documents see the virtual tokens and not each other
    packed = logits(ours, ids, POSITIONS)
    for row, start, stop in DOCUMENTS:
        alone = logits(ours, ids[row : row + 1, start:stop])[0]
        torch.testing.assert_close(packed[row, start:stop], alone, rtol=0, atol=2e-6)
    assert documents_are_isolated(ours, torch.device("cpu"))

    # through the model's cache, as PEFT, and as without a cache
    generated = greedy(ours, ids)
    assert torch.equal(generated, greedy(peft, ids))
    longer = torch.cat([ids, generated[:, :-1]], 1)
    assert torch.equal(logits(ours, longer).argmax(-1)[:, 11:], generated)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_left_padding_changes_nothing(method: str, tmp_path: Path) -> None:
    """What ``generate`` is given for prompts of several lengths."""
    save_model(CONFIGS["llama"], tmp_path)
    model = load(tmp_path)
    attach(METHODS[method], model)
    ids = random_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    assert torch.equal(greedy(model, padded, mask), greedy(model, ids))


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_blocks_give_the_same_gradients(method: str, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    found = []
    for recompute in (False, True):
        model = load(tmp_path)
        adapter = attach(METHODS[method], model)
        if recompute:
            checkpoint_block_activations(list(model.model.layers))
        logits(model, random_ids(2, 12), POSITIONS).square().sum().backward()
        found.append({n: p.grad for n, p in adapter.encoder.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-9)


def test_start_does_not_depend_on_the_model_and_is_not_repeated(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    starts = []
    for seed in (0, 0, 1):
        encoder = attach(METHODS["ptuning"], load(tmp_path), seed=seed).encoder
        starts.append(torch.cat([p.flatten() for p in encoder.parameters()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.isclose(starts[0], starts[2]).any()


def test_parameters_that_were_not_gathered_are_refused(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    adapter = attach(METHODS["prompt"], load(tmp_path))
    for value, words in ((None, "is absent"), (torch.empty(0), r"has shape \[0\]")):
        tensors = {} if value is None else {"prompt_encoder.embedding": value}
        with pytest.raises(RuntimeError, match=rf"prompt_encoder.embedding {words}"):
            adapter.to_public_adapter(tensors, "base")


def test_embedding_of_another_kind_is_refused() -> None:
    model = nn.Module()
    model.get_input_embeddings = lambda: nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(UserError, match="input embedding is a Linear"):
        virtual.read_embedding_width(model)


def test_positions_are_taken_only_in_front(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    adapter = attach(METHODS["ptuning"], load(tmp_path))
    assert adapter.num_extra_positions == 3
    adapter.config = PTuningConfig(num_virtual_tokens=3, pseudo_token="<p>")
    assert adapter.num_extra_positions == 0
