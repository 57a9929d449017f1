"""Parameters of encoders: their starts, their rows, their dropout."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dist_peft.adapters.virtual_tokens.encoder import (
    Drop,
    ParameterInit,
    PromptEncoder,
    apply_linear,
    init_linear_parameters,
    keep_all_values,
)
from dist_peft.core.span import Span
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.model.sample_dropout import DropoutPosition

STARTS = {"embedding": ParameterInit((5, 4)), **init_linear_parameters("output", 4, 6)}


class _Encoder(PromptEncoder):
    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        return drop(0, apply_linear(parameters["embedding"], parameters, "output"))


def made(seed: int = 0, dropout: float = 0.0) -> tuple[_Encoder, DropoutPosition]:
    position = DropoutPosition(seed)
    base = nn.Embedding(7, 4)
    encoder = _Encoder(base, STARTS, position, dropout=dropout, dropouts=1)
    for name, start in STARTS.items():
        rows = encoder.init_rows(name, Span(0, start.shape[0]))
        encoder.register_parameter(name, nn.Parameter(rows))
    return encoder, position


def test_is_loaded_after_the_embedding_and_does_not_own_it() -> None:
    encoder, _ = made()
    assert isinstance(encoder, AdapterModule)
    assert set(dict(encoder.named_parameters())) == set(STARTS)
    assert isinstance(encoder.base, nn.Embedding)


def test_rows_do_not_depend_on_who_asks() -> None:
    encoder, _ = made()
    for name, start in STARTS.items():
        rows = start.shape[0]
        whole = encoder.init_rows(name, Span(0, rows))
        parts = [encoder.init_rows(name, Span(a, min(a + 2, rows))) for a in range(0, rows, 2)]
        assert torch.equal(torch.cat(parts), whole)
        assert encoder.init_rows(name, Span(rows, rows)).shape == (0, *start.shape[1:])


def test_linear_starts_within_its_bound_and_computes_as_torch() -> None:
    encoder, _ = made()
    torch_linear = nn.Linear(4, 6)
    torch_linear.weight, torch_linear.bias = encoder.output_weight, encoder.output_bias
    assert encoder.output_weight.abs().max() <= 0.5 and encoder.output_bias.abs().max() <= 0.5
    assert torch.equal(encoder(), torch_linear(encoder.embedding))


def test_dropout_is_that_of_the_step_and_off_in_evaluation() -> None:
    encoder, position = made(dropout=0.5)
    values = {}
    for step in (0, 0, 1):
        position.begin_micro_batch(step, torch.zeros(1))
        value = encoder()
        assert step not in values or torch.equal(values[step], value)
        values[step] = value
    assert not torch.equal(values[0], values[1])
    assert (values[0] == 0).any()
    parameters = dict(encoder.named_parameters())
    assert torch.equal(encoder.eval()(), encoder.encode_prompt(parameters))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_is_made_on_the_device_asked_for(device: str) -> None:
    encoder = _Encoder(nn.Embedding(7, 4), STARTS, DropoutPosition(0), device=device)
    assert {p.device.type for p in encoder.parameters()} == {device}
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
