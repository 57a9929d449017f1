"""Shared by the methods with virtual tokens: an encoder added to the model, hooks on its decoder.

Nothing inside the model is replaced. Before the decoder runs (the module that looks up embeddings
and goes through the blocks), a hook changes its inputs; after it, another removes from its
output the positions of virtual tokens, so that neither loss nor labels know about them::

    forward of the model     engines have gathered parameters outside of blocks
      before decoder         encoder() -> virtual tokens; put into the decoder's inputs
      decoder                embeddings, blocks
      after decoder          as many states as there were tokens
      output head, loss      as without adapter

The methods differ in the inserted values: ``prompt_tuning`` and ``ptuning`` rows of embeddings,
``prefix`` keys and values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.protocol import (
    AdapterDefaults,
    ExportLimits,
    PublicAdapter,
    collect_gathered_parameters,
)
from dist_peft.adapters.virtual_tokens.encoder import PATH, PromptEncoder
from dist_peft.adapters.virtual_tokens.format import TENSOR, build_prompt_config
from dist_peft.adapters.virtual_tokens.insertion import TokenInsertion
from dist_peft.core.config.run import VirtualTokensConfig
from dist_peft.core.errors import UserError
from dist_peft.model.attention_mask import build_packing_mask, is_packed_sequence
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.sample_dropout import DropoutPosition

__all__ = [
    "InsertedTokensAdapter",
    "VirtualTokensAdapter",
    "read_embedding_width",
    "shift_positions",
]

Config = TypeVar("Config", bound=VirtualTokensConfig)


class VirtualTokensAdapter(AdapterDefaults, ABC, Generic[Config]):
    """Puts trainable virtual tokens in front of each document.

    The encoder computes in float32 whatever the arithmetic type, so that the deployed values
    are the trained ones; it is small, and runs once a forward.

    Attributes:
        position: step and samples that seed the encoder's dropout.
        encoder: once attached.
    """

    encoder: PromptEncoder

    def __init__(self, config: Config, *, seed: int) -> None:
        self.config = config
        self.position = DropoutPosition(seed)

    @property
    def num_extra_positions(self) -> int:
        return self.config.num_virtual_tokens

    # -- building ------------------------------------------------------------------------------

    def attach_to_model(self, model: nn.Module) -> None:
        """Add the encoder to the model and register hooks on its decoder.

        Raises:
            UserError: the method does not fit the model.
        """
        self.model = model
        self.encoder = self._build_encoder(model)
        setattr(model, PATH, self.encoder)
        decoder = cast(Any, model).get_decoder()

        def call_decoder_pre_hook(
            decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if not self.encoder.is_enabled:
                return None
            if args:  # some families pass the ids by position
                kwargs = {"input_ids": args[0], **kwargs}
            assert len(args) < 2, "a decoder is called with names"
            return (), self._prepare_decoder_inputs(kwargs)

        def call_decoder_hook(decoder: nn.Module, args: Any, output: Any) -> None:
            if self.encoder.is_enabled:
                self._process_decoder_output(output)

        decoder.register_forward_pre_hook(call_decoder_pre_hook, with_kwargs=True)
        decoder.register_forward_hook(call_decoder_hook)

    @abstractmethod
    def _build_encoder(self, model: nn.Module) -> PromptEncoder:
        """The encoder for this model, its parameters on meta."""

    @abstractmethod
    def _prepare_decoder_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder -> those with virtual tokens."""

    @abstractmethod
    def _process_decoder_output(self, output: Any) -> None:
        """Take virtual tokens out of the decoder's output, in place."""

    # -- training ------------------------------------------------------------------------------

    def begin_micro_batch(self, step: int, sample_ids: Tensor) -> None:
        self.position.begin_micro_batch(step, torch.zeros(1))  # one mask for all rows

    # -- saving --------------------------------------------------------------------------------

    def get_export_limits(self, tied: bool) -> ExportLimits:
        reason = "virtual tokens change no weight"
        return ExportLimits(
            merged=reason, separate=f"{reason}; peft writes them for any base that PEFT loads"
        )

    def to_public_adapter(self, tensors: Mapping[str, Tensor], base: str) -> PublicAdapter:
        """The encoder's value in PEFT's form. See ``Adapter`` and
        ``adapters.virtual_tokens.format``."""
        shapes = {name: tuple(start.shape) for name, start in self.encoder.starts.items()}
        parameters = collect_gathered_parameters(tensors, {PATH: shapes})[PATH]
        with torch.no_grad():
            virtual = self.encoder.encode_prompt(parameters).contiguous().clone()
        text = cast(Any, self.model).config.get_text_config()
        config = build_prompt_config(self.config, base, text, virtual.shape[1])
        return PublicAdapter(config, {TENSOR: virtual})


class InsertedTokensAdapter(VirtualTokensAdapter[Config]):
    """Virtual tokens as rows of embeddings in front of each document.

    Every document of a packed row gets them, with positions of their own. In generation they stand
    before the prompt and rest in the model's cache from then on.
    """

    _insertion: TokenInsertion | None = None

    def _prepare_decoder_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        count = self.config.num_virtual_tokens
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if cache is not None and cache.get_seq_length():  # they are in it
            self._insertion = None
            return {**kwargs, **shift_positions(count, positions, padding)}
        ids = kwargs["input_ids"]
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        positions = positions.expand(ids.shape[0], -1)
        if padding is None:
            insertion = TokenInsertion.insert_before_documents(positions, count)
            # without a restart of positions the model's own causal mask is right
            packed = is_packed_sequence(insertion.position_ids)
            mask = build_packing_mask(self.model, insertion.position_ids) if packed else None
        else:
            insertion = TokenInsertion.insert_before_sequences(positions, count)
            mask = insertion.widen_attention_mask(padding)
        self._insertion = insertion
        embeddings = self.encoder.base(ids)
        return {
            **kwargs,
            "input_ids": None,
            "inputs_embeds": insertion.insert_embeddings(
                embeddings, self.encoder().to(embeddings.dtype)
            ),
            "position_ids": insertion.position_ids,
            "attention_mask": mask,
        }

    def _process_decoder_output(self, output: Any) -> None:
        if self._insertion is not None:
            output.last_hidden_state = self._insertion.remove_inserted_states(
                output.last_hidden_state
            )
            self._insertion = None


def shift_positions(count: int, positions: Tensor | None, padding: Tensor | None) -> dict[str, Any]:
    """Positions and padding mask of tokens that have ``count`` virtual ones before them."""
    changed: dict[str, Any] = {}
    if positions is not None:
        changed["position_ids"] = positions + count
    if padding is not None:
        changed["attention_mask"] = torch.cat([padding.new_ones(len(padding), count), padding], 1)
    return changed


def read_embedding_width(model: nn.Module) -> int:
    """Size of a row of the input embedding."""
    embedding = cast(Any, model).get_input_embeddings()
    if not isinstance(embedding, nn.Embedding | FrozenEmbedding):
        raise UserError(
            f"adapter: the input embedding is a {type(embedding).__name__}, in front of which "
            "virtual tokens cannot be put; use adapter.kind lora"
        )
    return embedding.embedding_dim
