"""P-tuning's encoders against torch's modules, and pseudo tokens at any place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_peft.adapters.virtual_tokens.p_tuning import (
    LstmEncoder,
    MlpEncoder,
    number_within_documents,
)
from dist_peft.core.config.run import PTuningConfig
from dist_peft.core.errors import UserError
from dist_peft.model.sample_dropout import DropoutPosition
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import save_words
from tests.support.virtual_tokens import attach, load, random_ids

WIDTH = 6


def encoder_and_values(config: PTuningConfig) -> tuple[Any, dict[str, Tensor]]:
    kind = LstmEncoder if config.encoder == "lstm" else MlpEncoder
    encoder = kind(nn.Embedding(7, WIDTH), WIDTH, config, DropoutPosition(0))
    generator = torch.Generator().manual_seed(0)
    return encoder, {
        name: torch.randn(start.shape, generator=generator)
        for name, start in encoder.starts.items()
    }


def test_mlp_is_that_of_torch() -> None:
    encoder, own = encoder_and_values(PTuningConfig(num_virtual_tokens=4, encoder_hidden_size=5))
    mlp = nn.Sequential(
        nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, WIDTH)
    )
    names = [f"{n}_{k}" for n in ("hidden0", "hidden1", "output") for k in ("weight", "bias")]
    for parameter, name in zip(mlp.parameters(), names, strict=True):
        parameter.data = own[name]
    assert torch.equal(encoder.encode_prompt(own), mlp(own["embedding"]))
    assert sum(p.numel() for p in encoder.parameters()) == 4 * 6 + 5 * 7 + 5 * 6 + 6 * 6


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_lstm_is_that_of_torch(layers: int) -> None:
    config = PTuningConfig(
        num_virtual_tokens=4, encoder="lstm", encoder_hidden_size=5, encoder_layers=layers
    )
    encoder, own = encoder_and_values(config)
    lstm = nn.LSTM(WIDTH, 5, layers, bidirectional=True, batch_first=True)
    for name, parameter in lstm.named_parameters():
        parameter.data = own[name]
    head = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, WIDTH))
    names = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
    for parameter, name in zip(head.parameters(), names, strict=True):
        parameter.data = own[name]
    assert set(own) == {"embedding", *names, *dict(lstm.named_parameters())}
    expected = head(lstm(own["embedding"][None])[0])[0]
    torch.testing.assert_close(encoder.encode_prompt(own), expected, rtol=1e-5, atol=1e-6)


def test_lstm_dropout_is_between_its_layers() -> None:
    config = PTuningConfig(num_virtual_tokens=4, encoder="lstm", encoder_layers=3, dropout=0.5)
    encoder, own = encoder_and_values(config)
    numbers: list[int] = []

    def drop(number: int, x: Tensor) -> Tensor:
        assert x.shape == (4, 2 * WIDTH)
        numbers.append(number)
        return x

    encoder.encode_prompt(own, drop)
    assert numbers == [0, 1] and len(encoder.dropouts) == 2


# -- pseudo tokens -----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4))
def test_numbers_are_what_a_loop_says(documents: list[list[bool]]) -> None:
    found = torch.tensor([[x for document in documents for x in document]])
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    numbers = number_within_documents(found, positions)[0].tolist()
    expected = [sum(document[:t]) for document in documents for t in range(len(document))]
    assert numbers == expected
    if len(documents) == 1:
        assert number_within_documents(found, None)[0].tolist() == expected


PSEUDO = 3  # w3, which the tokenizer has as its unknown token


def save_base(directory: Path) -> Path:
    save_model(CONFIGS["llama"], directory)
    save_words(directory)
    return directory


def placed(directory: Path, **changes: Any) -> tuple[Any, Any]:
    model = load(save_base(directory))
    settings = {"num_virtual_tokens": 2, "pseudo_token": "w3", "encoder_hidden_size": 8, **changes}
    return model, attach(PTuningConfig(**settings), model)


@torch.no_grad()
def test_pseudo_tokens_are_replaced_in_order(tmp_path: Path) -> None:
    model, adapter = placed(tmp_path)
    ids = random_ids(1, 8)
    ids[0, [1, 3, 5]] = PSEUDO
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # two of the first document, one
    plain = load(tmp_path)
    virtual = adapter.encoder()
    embeddings = plain.model.embed_tokens(ids)
    embeddings[0, 1], embeddings[0, 3], embeddings[0, 5] = virtual[0], virtual[1], virtual[0]
    inputs = {"position_ids": positions, "use_cache": False}
    expected = plain(inputs_embeds=embeddings, **inputs).logits
    found = model(input_ids=ids, **inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_generation_replaces_those_of_the_prompt(tmp_path: Path) -> None:
    model, _ = placed(tmp_path)
    ids = random_ids(1, 8)
    ids[0, [1, 5]] = PSEUDO
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=True, **settings
    )
    found = model(input_ids=made[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(found[:, 7:], made[:, 8:])


def test_counts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, adapter = placed(tmp_path)
    ids = random_ids(2, 8)
    ids[0, 1:4] = PSEUDO
    with pytest.raises(UserError, match=r"w3 3 times, but adapter\.num_virtual_tokens is 2"):
        model(input_ids=ids)
    ids[0, 1] = 5
    adapter.begin_micro_batch(0, torch.tensor([7, -1]))  # the second is a filler row
    model(input_ids=ids)
    adapter.begin_micro_batch(0, torch.tensor([7, 8]))
    with pytest.raises(UserError, match=r"a row of the training data has no adapter\.pseudo_token"):
        model(input_ids=ids)
    model(input_ids=ids)  # evaluation does not begin a step


def test_gradient_is_zero_and_not_absent_without_pseudo_tokens(tmp_path: Path) -> None:
    """Ranks whose rows have none take part in the sum of gradients."""
    model, adapter = placed(tmp_path)
    model(input_ids=random_ids(1, 8), use_cache=False).logits.sum().backward()
    for name, parameter in adapter.encoder.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_token_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pseudo_token '<p>' is no token .* such as w0, w1"):
        placed(tmp_path, pseudo_token="<p>")


def test_directory_is_not_pefts(tmp_path: Path) -> None:
    _, adapter = placed(tmp_path)
    tensors = {f"prompt_encoder.{n}": p.detach() for n, p in adapter.encoder.named_parameters()}
    config = json.loads(json.dumps(adapter.to_public_adapter(tensors, "base").config))
    assert (config["peft_type"], config["pseudo_token"]) == ("P_TUNING_PLACED", "w3")
