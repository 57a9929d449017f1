"""Choosing the next token, against a slow reference; ``generate`` of plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from dist_peft.core.errors import UserError
from dist_peft.model.generation import (
    Sampling,
    TokenChooser,
    count_free_positions,
    encode_plain_prompt,
    generate_tokens,
    load_plain_model,
    select_token,
)
from dist_peft.model.hub import load_tokenizer
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(CONFIGS["llama"], path)
    save_words(path)
    return path


def list_nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """The tokens that can be drawn with their shares, one after the other."""
    weights = {i: torch.tensor(z / temperature).exp().item() for i, z in enumerate(logits)}
    total, kept, mass = sum(weights.values()), dict[int, float](), 0.0
    for token in sorted(weights, key=lambda i: -weights[i]):
        if mass >= top_p:
            break
        kept[token] = weights[token] / total
        mass += kept[token]
    return {token: share / mass for token, share in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5), (1.0, 0.01)]
)
def test_draws_are_those_of_the_definition(temperature: float, top_p: float) -> None:
    logits = [0.3, 2.0, -1.0, 1.2, 1.9, -torch.inf]
    sampling = Sampling(temperature=temperature, top_p=top_p)
    generator = torch.Generator().manual_seed(3)
    draws = [select_token(torch.tensor(logits), sampling, generator) for _ in range(1500)]
    expected = list_nucleus(logits, temperature, top_p)
    assert set(draws) == {token for token, share in expected.items() if share > 0}
    for token, share in expected.items():
        assert draws.count(token) / len(draws) == pytest.approx(share, abs=0.04)


def test_greedy_is_the_first_largest_logit() -> None:
    generator = torch.Generator()
    assert select_token(torch.tensor([0.0, 5.0, 5.0]), Sampling(), generator) == 1


def test_chosen_token_is_that_of_the_first_rank() -> None:
    """Another rank computes other logits, and generates the token that it was sent."""

    def share(token: torch.Tensor) -> None:
        token.fill_(3)

    left = TokenChooser(Sampling(), share)(torch.zeros(1, 1), torch.tensor([[9.0, 1.0, 1.0, 0.5]]))
    assert left.tolist() == [[-torch.inf] * 3 + [0.0]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_equal_to_generate_of_transformers(directory: Path, use_cache: bool) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([[1, 40, 41, 52]])
    expected = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )[0, 4:].tolist()
    shown: list[str] = []
    found = generate_tokens(
        load_plain_model(directory, CPU),
        load_tokenizer(directory),
        ids[0].tolist(),
        Sampling(20, use_cache=use_cache),
        stop_ids=[2],
        device=CPU,
        show=shown.append,
    )
    assert found == expected and len(set(found)) > 3
    assert "".join(shown).split() == [f"w{token}" for token in found if token > 3]
    assert len(shown) > 3  # in pieces


def test_seed_and_stop_token(directory: Path) -> None:
    model, tokenizer = load_plain_model(directory, CPU), load_tokenizer(directory)

    def draw(seed: int, *stops: int) -> list[int]:
        sampling = Sampling(12, temperature=1.5, top_p=0.9, seed=seed)
        return generate_tokens(
            model, tokenizer, [1, 40], sampling, stop_ids=stops or [2], device=CPU
        )

    first = draw(5)
    assert draw(5) == first and draw(6) != first
    place = first.index(first[4])
    assert draw(5, 2, first[4]) == first[: place + 1]


def test_room_for_an_answer(directory: Path) -> None:
    model: Any = load_plain_model(directory, CPU)
    known = model.config.max_position_embeddings
    assert count_free_positions(model, known - 3) == 3
    with pytest.raises(UserError, match=rf"has {known} tokens, and the model takes {known}"):
        count_free_positions(model, known)


def test_plain_prompt_begins_as_in_training(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    plain = tokenizer("w40 w41", add_special_tokens=False)["input_ids"]
    assert encode_plain_prompt(tokenizer, "w40 w41") == plain == [40, 41]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    assert encode_plain_prompt(tokenizer, "w40 w41") == [1, 40, 41]
    assert encode_plain_prompt(tokenizer, "w40 w2") == [1, 40, 2]
    assert encode_plain_prompt(tokenizer, "w1 w40") == [1, 40]
    with pytest.raises(UserError, match="no token"):
        encode_plain_prompt(tokenizer, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a classifier"),
        ({"_attn_implementation": "some/kernel"}, "would download"),
        ({"model_type": "unknown"}, "transformers cannot load"),
    ],
)
def test_unusable_directory(
    directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_plain_model(tmp_path, CPU)


def test_pickled_weights_are_not_loaded(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_plain_model(tmp_path, CPU)
