"""Tokenize examples to token documents, once, and cache them.

========== ============================================ ========================================
example    tokens                                       in the loss (loss_on: completion)
========== ============================================ ========================================
Completion [bos] prompt | completion eos                completion and eos, those of earlier turns
Chat       the rendered template, its own tokens only   assistant turns with their end token
Text       [bos] text eos                               everything
========== ============================================ ========================================

Labelled examples are encoded in ``pairs``: they have a class, and no tokens to predict.

bos is added only if the tokenizer itself adds it. Prompt and completion are tokenized separately,
so that the prompt has the tokens it will have at inference: tokenized together, a token may span
the boundary. The stored documents do not depend on ``seq_len``, ``packing`` or ``too_long``, which
are applied later, so changing these does not tokenize again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from typing import Literal

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.augmenting import make_record_augmenter
from dist_peft.data.cache import (
    DocumentWriter,
    TokenDocuments,
    find_cache_root,
    load_or_build_documents,
)
from dist_peft.data.chat import ChatRenderer, Tokenizer
from dist_peft.data.document_batch import EncodedDocuments
from dist_peft.data.examples import ChatExample, CompletionExample, Example, TextExample
from dist_peft.data.files import RecordPlace, open_source, read_chunks
from dist_peft.data.pairs import PairEncoder
from dist_peft.data.sources import ExampleReader
from dist_peft.data.tally import Tally
from dist_peft.data.tokenizing import SourceTokenizer

__all__ = ["ExampleEncoder", "Tokenizer", "load_token_documents"]

Mask = NDArray[np.uint8]
LossOn = Literal["completion", "all"]
TurnEnd = Literal["error", "warn"]

_LOG = logging.getLogger("dist_peft")
_FORMAT_VERSION = 6  # of the cache; raise it when the documents of the same input change


def load_token_documents(
    config: DataConfig,
    source: DataSource,
    tokenizer: Tokenizer,
    key: str,
    *,
    logs_notes: bool = True,
) -> TokenDocuments:
    """Return the token documents of one source, from the cache or tokenized now.

    Args:
        config: ``loss_on``, ``turn_end``, ``workers``, ``chat_template`` (its text) and
            ``cache_dir`` are used; with labels also ``seq_len`` and ``too_long``.
        key: configuration key of the source for messages, such as ``data.train[0]``.
        logs_notes: log the documents' notes for the user.

    Raises:
        UserError: see ``files``, ``sources``, ``chat``; or a tokenizer that is not fast or has no
            eos token.
    """
    opened = open_source(source, key)
    window = config.seq_len if config.too_long == "truncate" else None
    encoder: ExampleEncoder | PairEncoder
    if source.format == "classification":
        encoder = PairEncoder(tokenizer, window)
    else:
        encoder = ExampleEncoder(
            tokenizer, config.loss_on, config.turn_end, given_template=config.chat_template
        )
    augmenter = make_record_augmenter(config, source, tokenizer, key)

    def write_documents(writer: DocumentWriter) -> None:
        _LOG.info("tokenizing %s", source.path)
        tokenizing = SourceTokenizer(ExampleReader(source, key, augmenter), encoder)
        chunks = read_chunks(opened, source.limit)
        with closing(tokenizing.tokenize_chunks(chunks, config.workers)) as batches:
            for batch in batches:
                writer.append_documents(batch)
        writer.is_text = tokenizing.reader.is_text
        writer.notes = [*tokenizing.reader.finish_source(), *encoder.user_notes]
        writer.chat_template = encoder.saved_template
        writer.has_conversations = tokenizing.reader.has_conversations

    identity = {
        "version": _FORMAT_VERSION,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "tokenizer": _describe_tokenizer(tokenizer),
        "source": source.model_dump(mode="json", exclude={"augment"}),
        "files": opened.list_fingerprints(),
        "loss_on": config.loss_on,
        "turn_end": config.turn_end,
        # the tokenizer itself truncates a pair, so its documents depend on the length
        "window": window if source.format == "classification" else None,
    }
    if augmenter is not None:
        identity["augment"] = augmenter.identity
    if config.chat_template is not None:  # the tokenizer's may be the same, but is not stored
        identity["chat_template"] = config.chat_template
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    documents = load_or_build_documents(find_cache_root(config.cache_dir), name, write_documents)
    for note in documents.notes if logs_notes else ():
        _LOG.warning("%s: %s", key, note, extra=ONCE)
    return documents


def _describe_tokenizer(tokenizer: Tokenizer) -> list[object]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # settings of the last call, not of the tokenizer
    state.pop("truncation", None)
    state.pop("padding", None)
    return [state, tokenizer.chat_template, tokenizer.special_tokens_map]


class ExampleEncoder:
    """Tokenize examples and mask the tokens that contribute to the loss.

    Args:
        given_template: ``data.chat_template``, which ``tokenizer`` has already; saved with it.

    Attributes:
        user_notes: one-time warnings for the user.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss_on: LossOn,
        turn_end: TurnEnd = "error",
        *,
        given_template: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) has no "
                "tokenizer.json, so that tokens cannot be traced to characters; convert it to a "
                "fast tokenizer of transformers"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no eos_token, so that the model could "
                "not learn where to stop; set eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._loss_on: LossOn = loss_on
        self._turn_end: TurnEnd = turn_end
        self._given_template = given_template
        self._front = _find_front_tokens(tokenizer)
        self._eos = [int(tokenizer.eos_token_id)]
        self._backend_is_same: bool | None = None
        self._chats: ChatRenderer | None = None

    @property
    def user_notes(self) -> list[str]:
        return [] if self._chats is None else self._chats.user_notes

    @property
    def tallies(self) -> tuple[Tally, ...]:
        return () if self._chats is None else self._chats.tallies

    def begin_chunk(self) -> None:
        """Forget what depends on where earlier examples were encoded."""
        if self._chats is not None:
            self._chats.begin_chunk()

    @property
    def saved_template(self) -> str | None:
        """The chat template that conversations used, if it is not the base's: a given one, or this
        project's because the tokenizer has none."""
        if self._chats is None:
            return None
        return self._given_template or self._chats.default_template

    def encode_examples(
        self, examples: Sequence[Example], places: Sequence[RecordPlace]
    ) -> EncodedDocuments:
        """Return the documents of the examples, which are all of one class."""
        if isinstance(examples[0], CompletionExample):
            return self._encode_completions(
                [e for e in examples if isinstance(e, CompletionExample)]
            )
        if isinstance(examples[0], ChatExample):
            return self._encode_conversations(
                [e for e in examples if isinstance(e, ChatExample)], places
            )
        return self._encode_texts([e for e in examples if isinstance(e, TextExample)])

    def _encode_completions(self, examples: list[CompletionExample]) -> EncodedDocuments:
        turns = [(*e.earlier, (e.prompt, e.completion)) for e in examples]
        ids = iter(self._tokenize_plain([text for turn in turns for pair in turn for text in pair]))
        tokens: list[int] = []
        parts: list[int] = []  # lengths of context, target, context, target, ...
        ends = [0]
        for turn in turns:
            for number in range(len(turn)):
                context, target = next(ids), self._append_eos(next(ids))
                if number == 0:
                    context = self._prepend_bos(context)
                tokens += context
                tokens += target
                parts += (len(context), len(target))
            ends.append(len(tokens))
        context_bit = int(self._loss_on == "all")
        mask = np.repeat(np.tile(np.array([context_bit, 1], np.uint8), len(parts) // 2), parts)
        return EncodedDocuments(np.array(tokens, np.int32), mask, np.diff(ends).astype(np.int64))

    def _encode_texts(self, examples: list[TextExample]) -> EncodedDocuments:
        tokens: list[int] = []
        ends = [0]
        for text in self._tokenize_plain([e.text for e in examples]):
            tokens += self._append_eos(self._prepend_bos(text))
            ends.append(len(tokens))
        mask = np.ones(len(tokens), np.uint8)
        return EncodedDocuments(np.array(tokens, np.int32), mask, np.diff(ends).astype(np.int64))

    def _encode_conversations(
        self, examples: list[ChatExample], places: Sequence[RecordPlace]
    ) -> EncodedDocuments:
        if self._chats is None:
            self._chats = ChatRenderer(
                self._tokenizer,
                mark_assistant=self._loss_on == "completion",
                starts_with_bos=self._tokenizer.bos_token_id in self._front,
                turn_end=self._turn_end,
                template_name=self._given_template and "data.chat_template",
            )
        rendered = [
            self._chats.render_conversation(e.messages, e.tools, str(place))
            for e, place in zip(examples, places, strict=True)
        ]
        encoded = self._tokenizer(
            [chat.text for chat in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = encoded["input_ids"]
        masks = [
            _mask_tokens_in_spans(np.asarray(characters), chat.spans)
            for characters, chat in zip(encoded["offset_mapping"], rendered, strict=True)
        ]
        return EncodedDocuments(
            np.fromiter(chain.from_iterable(ids), np.int32),
            np.concatenate(masks),
            np.array([len(each) for each in ids], np.int64),
        )

    def _tokenize_plain(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens.

        The ``tokenizers`` library alone takes two thirds of the time of the tokenizer's own call,
        which also traces tokens to characters. Some classes do more in that call, so the first
        texts are tokenized both ways, and all later ones by the library only if these agree.
        """
        if self._backend_is_same:
            return self._tokenize_in_backend(texts)
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if self._backend_is_same is None:
            self._backend_is_same = self._tokenize_in_backend(texts) == ids
        return ids

    def _tokenize_in_backend(self, texts: list[str]) -> list[list[int]]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _prepend_bos(self, ids: list[int]) -> list[int]:
        """Prepend bos, unless the text starts with it."""
        return ids if ids[: len(self._front)] == self._front else self._front + ids

    def _append_eos(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self._eos else ids + self._eos


def _find_front_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: bos, or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def _mask_tokens_in_spans(
    characters: NDArray[np.int64], spans: tuple[tuple[int, int], ...]
) -> Mask:
    """Return the mask [T] of the tokens with at least one character in a span.

    Args:
        characters: [T, 2], characters [start, stop) of each token.
    """
    mask = np.zeros(len(characters), dtype=np.uint8)
    for start, stop in spans:
        first, last = characters[:, 0], characters[:, 1]
        mask |= ((first < stop) & (last > start) & (last > first)).astype(np.uint8)
    return mask
