"""Tokenize labelled texts and text pairs with the special tokens of the model's tokenizer::

    BERT      [CLS] a a a [SEP] b b [SEP]      types 0 0 0 0 0 1 1 1
    RoBERTa   <s> a a a </s> </s> b b </s>
    Llama     <s> a a a <s> b b                set by its post-processor

The *token type* distinguishes the two texts, for models with a token type embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_peft.core.errors import UserError
from dist_peft.data.chat import Tokenizer
from dist_peft.data.document_batch import EncodedDocuments
from dist_peft.data.examples import Example, LabelledExample
from dist_peft.data.files import RecordPlace
from dist_peft.data.tally import Tally

__all__ = ["PairEncoder"]


class PairEncoder:
    """Tokenize labelled examples.

    Args:
        tokenizer: of the base.
        window: truncate to this many tokens, from the longer of two texts (``longest_first`` of
            ``transformers``); None: do not truncate.

    Attributes:
        user_notes: one-time warnings for the user.
        counts: records, and those that were truncated.
        saved_template: always None, as no chat template is used.
    """

    saved_template = None

    def __init__(self, tokenizer: Tokenizer, window: int | None) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) has no "
                "tokenizer.json; convert it to a fast tokenizer of transformers"
            )
        self._tokenizer, self._window = tokenizer, window
        self.counts = Tally()

    @property
    def tallies(self) -> tuple[Tally, ...]:
        return (self.counts,)

    def begin_chunk(self) -> None:
        """Do nothing: no example depends on earlier ones."""

    @property
    def user_notes(self) -> list[str]:
        cut, seen = (self.counts.get_count(name) for name in ("cut", "seen"))
        return (
            []
            if not cut
            else [f"cut {cut} of {seen} records to data.seq_len {self._window} tokens"]
        )

    def encode_examples(
        self, examples: Sequence[Example], places: Sequence[RecordPlace]
    ) -> EncodedDocuments:
        """Return tokens and token types (in place of the mask) of each example.

        Raises:
            UserError: an example without a token.
        """
        documents = []
        for example, place in zip(examples, places, strict=True):
            assert isinstance(example, LabelledExample)
            ids, types = self._tokenize_example(example)
            # a text of special tokens alone is empty
            if not ids or not f"{example.text}{example.text_pair or ''}".strip():
                raise UserError(f"{place} has no token: its text is empty; remove or fix it")
            documents.append((ids, types))
        return EncodedDocuments(
            np.array([i for ids, _ in documents for i in ids], np.int32),
            np.array([t for _, types in documents for t in types], np.uint8),
            np.array([len(ids) for ids, _ in documents], np.int64),
        )

    def _tokenize_example(self, example: LabelledExample) -> tuple[list[int], list[int]]:
        texts = [example.text] if example.text_pair is None else [example.text, example.text_pair]
        encoded: Any = self._tokenizer(*texts, return_token_type_ids=True, verbose=False)
        self.counts.count("seen")
        if self._window is not None and len(encoded["input_ids"]) > self._window:
            self.counts.count("cut")
            encoded = self._tokenizer(
                *texts,
                return_token_type_ids=True,
                truncation="longest_first",
                max_length=self._window,
            )
        return encoded["input_ids"], encoded["token_type_ids"]
