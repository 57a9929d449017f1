"""The adapter method ``ptuning``: P-tuning (Liu et al. 2021, "GPT Understands, Too").

The virtual tokens are the output of a small network, the encoder, that ties them together and is
dropped after training. Shapes as in PEFT, ``h`` the width of the embeddings::

    mlp     E [P, h] -> Linear H, ReLU -> Linear H, ReLU -> Linear h
    lstm    E [P, h] -> bidirectional LSTM, 2 layers of H a direction -> Linear 2H, ReLU -> Linear h

They stand in front of each document, as in PEFT, or at any place as in the paper: then the data
have ``adapter.pseudo_token``, a token of the base's tokenizer, wherever one is to be::

    tokens    x0 <p> x1 <p> <p> x2 x3        the k-th <p> of a document
    embedded  e0 v0  e1 v1  v2  e2 e3        is the k-th virtual token

Nothing is inserted then, and positions, masks and packing are those of the data.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.adapters.protocol import ExportLimits
from dist_peft.adapters.virtual_tokens.encoder import (
    Drop,
    ParameterInit,
    PromptEncoder,
    apply_linear,
    init_linear_parameters,
    keep_all_values,
)
from dist_peft.adapters.virtual_tokens.method import InsertedTokensAdapter, read_embedding_width
from dist_peft.core.config.run import PTuningConfig
from dist_peft.core.errors import UserError
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.sample_dropout import DropoutPosition

__all__ = ["LstmEncoder", "MlpEncoder", "PTuningAdapter", "number_within_documents"]

_DIRECTIONS = ("", "_reverse")


class MlpEncoder(PromptEncoder):
    """``[P, h]`` through two hidden layers.

    Args:
        base: the model's input embedding.
        width: ``h``.
        config: settings of the encoder.
        position: see ``PromptEncoder``.
    """

    def __init__(
        self, base: nn.Module, width: int, config: PTuningConfig, position: DropoutPosition
    ) -> None:
        hidden = config.encoder_hidden_size or width
        starts = {
            "embedding": ParameterInit((config.num_virtual_tokens, width)),
            **init_linear_parameters("hidden0", width, hidden),
            **init_linear_parameters("hidden1", hidden, hidden),
            **init_linear_parameters("output", hidden, width),
        }
        super().__init__(base, starts, position)

    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        x = apply_linear(parameters["embedding"], parameters, "hidden0").relu()
        return apply_linear(apply_linear(x, parameters, "hidden1").relu(), parameters, "output")


class LstmEncoder(PromptEncoder):
    """``[P, h]`` through a bidirectional LSTM and one hidden layer. See ``MlpEncoder``.

    Parameters are named as in ``torch.nn.LSTM``, which is not used itself: it keeps a list of its
    weights of its own, where an engine that exchanges parameters does not reach.
    """

    def __init__(
        self, base: nn.Module, width: int, config: PTuningConfig, position: DropoutPosition
    ) -> None:
        hidden = config.encoder_hidden_size or width
        bound = 1 / math.sqrt(hidden)
        starts = {"embedding": ParameterInit((config.num_virtual_tokens, width))}
        for layer in range(config.encoder_layers):
            inputs = width if layer == 0 else 2 * hidden
            for end in (f"l{layer}{direction}" for direction in _DIRECTIONS):
                starts[f"weight_ih_{end}"] = ParameterInit((4 * hidden, inputs), bound)
                starts[f"weight_hh_{end}"] = ParameterInit((4 * hidden, hidden), bound)
                starts[f"bias_ih_{end}"] = ParameterInit((4 * hidden,), bound)
                starts[f"bias_hh_{end}"] = ParameterInit((4 * hidden,), bound)
        starts |= init_linear_parameters("hidden", 2 * hidden, 2 * hidden)
        starts |= init_linear_parameters("output", 2 * hidden, width)
        self.layers = config.encoder_layers
        super().__init__(
            base, starts, position, dropout=config.dropout, dropouts=config.encoder_layers - 1
        )

    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        x = parameters["embedding"]
        for layer in range(self.layers):
            if layer:
                x = drop(layer - 1, x)
            forth = _run_lstm_direction(x, parameters, f"l{layer}")
            back = _run_lstm_direction(x.flip(0), parameters, f"l{layer}_reverse").flip(0)
            x = torch.cat([forth, back], 1)
        return apply_linear(apply_linear(x, parameters, "hidden").relu(), parameters, "output")


def _run_lstm_direction(x: Tensor, parameters: Mapping[str, Tensor], end: str) -> Tensor:
    """One layer in one direction: ``[T, in]`` -> ``[T, H]`` (Hochreiter and Schmidhuber 1997)."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        parameters[f"{name}_{end}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    from_input = F.linear(x, weight_ih, bias_ih)
    state = memory = x.new_zeros(weight_hh.shape[1])
    states = []
    for row in from_input:
        enter, forget, new, leave = (row + F.linear(state, weight_hh, bias_hh)).chunk(4)
        memory = forget.sigmoid() * memory + enter.sigmoid() * new.tanh()
        state = leave.sigmoid() * memory.tanh()
        states.append(state)
    return torch.stack(states)


class PTuningAdapter(InsertedTokensAdapter[PTuningConfig]):
    """Virtual tokens computed by an LSTM or MLP, inserted where the placement says."""

    _pseudo: int | None = None
    """Id of the pseudo token; None: virtual tokens stand in front."""
    _training_rows: Tensor | None = None
    """Which rows of the micro-batch are real and must have a pseudo token."""

    @property
    def num_extra_positions(self) -> int:
        return self.config.num_virtual_tokens if self.config.pseudo_token is None else 0

    def _build_encoder(self, model: nn.Module) -> PromptEncoder:
        width = read_embedding_width(model)
        if self.config.pseudo_token is not None:
            directory = Path(cast(Any, model).config._name_or_path)
            self._pseudo = _find_token_id(self.config.pseudo_token, directory)
        encoder = LstmEncoder if self.config.encoder == "lstm" else MlpEncoder
        base = cast(Any, model).get_input_embeddings()
        return encoder(base, width, self.config, self.position)

    def get_export_limits(self, tied: bool) -> ExportLimits:
        limits = super().get_export_limits(tied)
        if self.config.pseudo_token is None:
            return limits
        return replace(limits, adapter="PEFT only prepends virtual tokens")

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        super().begin_micro_batch(step, sample_ids)
        self._training_rows = sample_ids >= 0

    def _prepare_decoder_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._pseudo is None:
            return super()._prepare_decoder_inputs(kwargs)
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        found = ids == self._pseudo
        number = number_within_documents(found, positions)
        self._check_marker_count(found, number)
        embeddings = self.encoder.base(ids)
        virtual = self.encoder().to(embeddings.dtype)
        placed = virtual[number.clamp(0, len(virtual) - 1)]
        embeddings = torch.where(found[..., None], placed, embeddings)
        return {**kwargs, "input_ids": None, "inputs_embeds": embeddings}

    def _check_marker_count(self, found: Tensor, number: Tensor) -> None:
        token, count = self.config.pseudo_token, self.config.num_virtual_tokens
        rows, self._training_rows = self._training_rows, None
        if bool((found & (number >= count)).any()):
            most = int(number[found].max()) + 1
            raise UserError(
                f"a document has adapter.pseudo_token {token} {most} times, but "
                f"adapter.num_virtual_tokens is {count}; raise it, or fix the data"
            )
        if rows is not None and not bool((found.any(1) | ~rows.to(found.device)).all()):
            raise UserError(
                f"a row of the training data has no adapter.pseudo_token {token}, so it would "
                "teach nothing; put the token into each record, or leave adapter.pseudo_token out "
                "to have virtual tokens in front of each document"
            )


def number_within_documents(found: Tensor, position_ids: Tensor | None) -> Tensor:
    """``[B, S]``: of each found token, how many there were before it in its document.

    Args:
        found: bool ``[B, S]``.
        position_ids: ``[B, S]``, 0 where a document begins; None: one document a row.
    """
    before = found.long().cumsum(1) - found.long()
    if position_ids is None:
        return before
    at_start = torch.where(position_ids == 0, before, 0).cummax(1).values
    return before - at_start


def _find_token_id(token: str, directory: Path) -> int:
    """Of a token that the tokenizer knows and never makes two of.

    Raises:
        UserError: it does not.
    """
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(f"{token}{token}", add_special_tokens=False)["input_ids"]
    if len(ids) == 2 and ids[0] == ids[1] == tokenizer.convert_tokens_to_ids(token):
        return int(ids[0])
    special = sorted(str(t) for t in tokenizer.added_tokens_decoder.values())
    raise UserError(
        f"adapter.pseudo_token {token!r} is no token that the base's tokenizer finds wherever it "
        "stands; choose one of its special tokens that the data do not use otherwise"
        + (f", such as {', '.join(special[:5])}" if special else " (it has none)")
    )
