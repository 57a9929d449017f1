"""The adapter method ``prompt``: prompt tuning (Lester, Al-Rfou, Constant 2021).

``P`` trained rows of embeddings stand in front of each document; nothing else is trainable::

    [v0 v1 ... | x0 x1 x2 ...]        v [P, hidden]

They start from embeddings of random tokens, from those of a text, or from a normal distribution
(PEFT's default, far from any embedding). Embeddings are read from the base's file, each rank those
of its own virtual tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_peft.adapters.virtual_tokens.encoder import (
    PATH,
    Drop,
    ParameterInit,
    PromptEncoder,
    keep_all_values,
)
from dist_peft.adapters.virtual_tokens.method import InsertedTokensAdapter, read_embedding_width
from dist_peft.core.config.run import PromptConfig
from dist_peft.core.errors import UserError
from dist_peft.core.seeds import derive_seed
from dist_peft.core.span import Span
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.sample_dropout import DropoutPosition
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["PromptEmbedding", "PromptTuningAdapter"]


class PromptEmbedding(PromptEncoder):
    """The virtual tokens themselves.

    Args:
        base: the model's input embedding.
        shape: ``[num_virtual_tokens, width]``.
        position: see ``PromptEncoder``.
        tokens: whose embeddings they start from; None: normal.
        directory: of the base.
    """

    def __init__(
        self,
        base: nn.Module,
        shape: tuple[int, int],
        position: DropoutPosition,
        tokens: list[int] | None,
        directory: Path,
    ) -> None:
        super().__init__(base, {"embedding": ParameterInit(shape)}, position)
        self.tokens, self.directory = tokens, directory

    def encode_prompt(
        self, parameters: Mapping[str, Tensor], drop: Drop = keep_all_values
    ) -> Tensor:
        return parameters["embedding"]

    def init_rows(self, name: str, span: Span) -> Tensor:
        if self.tokens is None:
            return super().init_rows(name, span)
        base = cast(Any, self.base)
        rows = torch.empty(len(span), *self.starts[name].shape[1:])
        with RowReader(SafetensorsIndex.open(self.directory)) as reader:
            for row, token in zip(rows, self.tokens[span.slice], strict=True):
                packs = isinstance(base, FrozenEmbedding)
                source = base.source if packs else base.checkpoint_names["weight"]
                read = reader.read_rows(source, Span(token, token + 1))
                read = base.fake_quantize(read) if packs else read
                row.copy_(read[0].to(self.base_dtype))
        scale = getattr(base, "embed_scale", None)  # Gemma scales its embeddings
        return rows if scale is None else rows * torch.as_tensor(scale).float().cpu()


class PromptTuningAdapter(InsertedTokensAdapter[PromptConfig]):
    """Trainable embeddings in front of each document."""

    def _build_encoder(self, model: nn.Module) -> PromptEncoder:
        shape = (self.config.num_virtual_tokens, read_embedding_width(model))
        directory = Path(cast(Any, model).config._name_or_path)
        embedding = cast(Any, model).get_input_embeddings()
        tokens = self._tokenize_init_text(embedding.num_embeddings, directory)
        return PromptEmbedding(embedding, shape, self.position, tokens, directory)

    def _tokenize_init_text(self, vocabulary: int, directory: Path) -> list[int] | None:
        count = self.config.num_virtual_tokens
        if self.config.init == "random":
            return None
        if self.config.init == "vocab":
            seed = derive_seed(self.position.seed, PATH, "vocab")
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(vocabulary, (count,), generator=generator).tolist()
        tokens: list[int] = load_tokenizer(directory)(self.config.init_text)["input_ids"]
        if not tokens or max(tokens) >= vocabulary:
            raise UserError(
                f"adapter.init_text {self.config.init_text!r} gives tokens {tokens}, of which the "
                f"base must have embeddings (it has {vocabulary}); use another text"
            )
        return (tokens * -(-count // len(tokens)))[:count]
