"""Variants of the records of a training source (``data.train[].augment``).

A record becomes ``1 + num_aug`` documents, one after another: itself and its variants. Only texts
of the ``fields`` of its format are changed: never a label, the text of a template, a system prompt
or the assistant's text, unless ``fields`` names it.

============== =================================================
format         changed by default
============== =================================================
chat           the user's turns
completion     prompt (or the columns in the template)
alpaca         instruction, input (or the columns in the template)
text           the document, all of which contributes to the loss
classification text, text_pair
============== =================================================

The draws of a variant come from ``augment.seed`` and the texts of the record alone: not from its
place in the file, the process that tokenizes it, or other records. Records with the same text have
the same variants.
"""

import hashlib
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from dist_peft.core.config.augment import AugmentConfig, EdaConfig, FunctionAugmentConfig
from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.seeds import RandomDraws, derive_seed
from dist_peft.data.chat import Tokenizer
from dist_peft.data.eda import EdaAugmenter
from dist_peft.data.examples import ChatExample, Example
from dist_peft.data.files import RecordPlace
from dist_peft.data.messages import check_unicode
from dist_peft.data.record_fields import RecordFields, get_column_value, parse_template_fields
from dist_peft.data.record_formats import RecordFormat
from dist_peft.data.synonyms import read_synonym_file
from dist_peft.data.tally import Tally

__all__ = ["RecordAugmenter", "make_record_augmenter"]

_VERSION = 1  # of the variants; raise it when those of the same text change

_DEFAULT_FIELDS = {
    "chat": ("messages",),
    "completion": ("prompt",),
    "alpaca": ("instruction", "input"),
    "text": ("text",),
    "classification": ("text", "text_pair"),
}
_FIELDS = {
    "chat": ("messages",),
    "completion": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
    "text": ("text",),
    "classification": ("text", "text_pair"),
}
"""By format, the roles that ``augment.fields`` may name."""


class TextAugmenter(Protocol):
    """Makes variants of a text."""

    def make_variants(self, text: str, draws: RandomDraws) -> list[str]:
        """Return ``num_aug`` variants of ``text``, which is not blank."""


class RecordAugmenter:
    """Make the variants of records of one source.

    Args:
        config: of the source.
        augmenter: of texts.
        content: digest of further inputs of the variants: synonyms, a function's file.
        key: configuration key, such as ``data.train[0].augment``.

    Attributes:
        counts: records, and those with a variant that is equal to them.
    """

    def __init__(
        self, config: AugmentConfig, augmenter: TextAugmenter, content: str, key: str
    ) -> None:
        self._config, self._augmenter, self._content, self._key = config, augmenter, content, key
        self.counts = Tally()

    @property
    def identity(self) -> dict[str, object]:
        """All that the variants depend on: part of the key of the token cache."""
        about = self._config.model_dump(mode="json", exclude={"synonyms"})
        return {"version": _VERSION, "config": about, "content": self._content}

    @property
    def user_notes(self) -> list[str]:
        """One-time warnings for the user."""
        same, seen = (self.counts.get_count(name) for name in ("same", "seen"))
        if not same:
            return []
        if same == seen:
            return [f"augment has changed none of {seen} records; check {self._key}"]
        return [f"{same} of {seen} records have a variant that is equal to the record"]

    def check_fields(self, record_format: RecordFormat) -> None:
        """Check that ``fields`` are roles of the format whose text can be changed.

        Raises:
            UserError: one is not.
        """
        allowed = _FIELDS[record_format.name]
        for role in self._config.fields or ():
            if role not in allowed:
                raise UserError(
                    f"{self._key}.fields: {role} is not a text of format {record_format.name} that "
                    f"can be changed; use {', '.join(allowed)}"
                )

    def list_variants(
        self, fields: RecordFields, record_format: RecordFormat, example: Example
    ) -> Iterator[Example]:
        """Yield the variants of ``example``, which ``record_format`` has built of ``fields``.

        Raises:
            UserError: a function fails or returns no text.
        """
        self.counts.count("seen")
        is_same = False
        for variant in self._make_variants(fields, record_format, example):
            is_same = is_same or variant == example
            yield variant
        if is_same:
            self.counts.count("same")

    def _make_variants(
        self, fields: RecordFields, record_format: RecordFormat, example: Example
    ) -> Iterator[Example]:
        if isinstance(example, ChatExample):
            users = [
                i
                for i, m in enumerate(example.messages)
                if m["role"] == "user" and (m.get("content") or "").strip()
            ]
            texts = [example.messages[i]["content"] for i in users]
            for changed in self._change_texts(texts, fields.place):
                messages = list(example.messages)
                for i, text in zip(users, changed, strict=True):
                    messages[i] = {**messages[i], "content": text}
                yield replace(example, messages=messages)
            return
        columns = self._list_columns(fields, record_format)
        texts = [get_column_value(fields.record, column) for column in columns]
        for changed in self._change_texts(texts, fields.place):
            record = {**fields.record, **dict(zip(columns, changed, strict=True))}
            yield record_format.build(replace(fields, record=record))

    def _list_columns(self, fields: RecordFields, record_format: RecordFormat) -> list[str]:
        """Return the columns to change, those with a text that is not blank."""
        template, found = fields.source.template, dict[str, None]()
        targets = {fields.column_of_role(role) for role in ("completion", "output")}
        for role in self._config.fields or _DEFAULT_FIELDS[record_format.name]:
            if template is not None and role == record_format.templated:
                for name in parse_template_fields(template):
                    is_column = isinstance(get_column_value(fields.record, name), str)
                    column = name if is_column else fields.column_of_role(name)
                    if column not in targets:
                        found[column] = None
            else:
                found[fields.column_of_role(role)] = None
        values = {column: get_column_value(fields.record, column) for column in found}
        return sorted(c for c, v in values.items() if isinstance(v, str) and v.strip())

    def _change_texts(self, texts: list[str], place: RecordPlace) -> Iterator[list[str]]:
        """Yield ``num_aug`` times a variant of each of ``texts``."""
        kind, seed = self._config.kind, self._config.seed
        whole = "\0".join(texts)
        made = []
        for number, text in enumerate(texts):
            draws = RandomDraws(seed, "augment", kind, number, whole)
            try:
                made.append(self._augmenter.make_variants(text, draws))
            except UserError as error:
                raise UserError(f"{self._key}: {place}: {error}") from None
        for variant in range(self._config.num_aug):
            yield [each[variant] for each in made]


def make_record_augmenter(
    config: DataConfig, source: DataSource, tokenizer: Tokenizer, key: str
) -> RecordAugmenter | None:
    """Return the augmenter of ``source``; None without ``augment``.

    Args:
        key: of the source, such as ``data.train[0]``.

    Raises:
        UserError: a synonym file or function that cannot be used; or a function that the command
            line does not allow.
    """
    augment, key = source.augment, f"{key}.augment"
    if augment is None:
        return None
    if isinstance(augment, EdaConfig):
        synonyms = (
            read_synonym_file(augment.synonyms, f"{key}.synonyms")
            if augment.synonyms is not None
            else {}
        )
        content = hashlib.sha256(repr(sorted(synonyms.items())).encode()).hexdigest()
        return RecordAugmenter(augment, EdaAugmenter(augment, synonyms), content, key)
    if isinstance(augment, FunctionAugmentConfig):
        if not config.allow_code:
            raise UserError(
                f"{key}.function {augment.function} is code, which runs only if the command line "
                "says so: add data.allow_code=true"
            )
        function, content = _import_function(augment.function, f"{key}.function")
        own = _FunctionAugmenter(function, augment.function, augment.num_aug)
        return RecordAugmenter(augment, own, content, key)
    dropout = _TokenDropout(tokenizer, augment.p, augment.num_aug)
    return RecordAugmenter(augment, dropout, "", key)


class _TokenDropout:
    """Leave out each token of a text with a probability; one stays.

    The characters of a token, with those before it that belong to none, are removed from the text.
    Tokens that are parts of one character go together. The rest is tokenized like any text, so
    that tokens around a gap may join.
    """

    def __init__(self, tokenizer: Tokenizer, p: float, num_aug: int) -> None:
        self._tokenizer, self._p, self._num_aug = tokenizer, p, num_aug

    def make_variants(self, text: str, draws: RandomDraws) -> list[str]:
        encoded: Any = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [0]
        for _, stop in encoded["offset_mapping"]:
            if stop > ends[-1]:
                ends.append(stop)
        tail = text[ends[-1] :]
        pieces = [text[a:b] for a, b in pairwise(ends)]
        if not pieces:
            return [text] * self._num_aug
        return [self._drop_pieces(pieces, draws) + tail for _ in range(self._num_aug)]

    def _drop_pieces(self, pieces: list[str], draws: RandomDraws) -> str:
        kept = "".join(piece for piece in pieces if draws.draw_uniform() >= self._p)
        solid = [piece for piece in pieces if piece.strip()] or pieces
        return kept if kept.strip() else solid[draws.draw_index(len(solid))]


class _FunctionAugmenter:
    """Call a function of the user for each variant."""

    def __init__(self, function: Callable[..., Any], name: str, num_aug: int) -> None:
        self._function, self._name, self._num_aug = function, name, num_aug

    def make_variants(self, text: str, draws: RandomDraws) -> list[str]:
        start = draws.draw_uniform()
        return [self._call(text, derive_seed(start, number)) for number in range(self._num_aug)]

    def _call(self, text: str, seed: int) -> str:
        try:
            found = self._function(text, random.Random(seed))
        except Exception as error:
            raise UserError(f"{self._name} failed: {type(error).__name__}: {error}") from None
        if not isinstance(found, str) or not found.strip():
            what = "a blank text" if isinstance(found, str) else f"{type(found).__name__}"
            raise UserError(
                f"{self._name} returned {what}; it must return a text that is not blank"
            )
        return check_unicode(found, f"the text from {self._name}")


def _import_function(name: str, key: str) -> tuple[Callable[..., Any], str]:
    """Import ``package.module:name``; return it and the SHA-256 of its module's file.

    Raises:
        UserError: it cannot be imported, is no function, or has no source file.
    """
    module_name, _, function_name = name.partition(":")
    # as `python -m` has it
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}; it is "
            f"looked for in {os.getcwd()} and in PYTHONPATH"
        ) from None
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "is not a function" if hasattr(module, function_name) else "does not exist"
        raise UserError(f"{key}: {function_name} {what} in module {module_name}")
    file = Path(getattr(module, "__file__", None) or "")
    if file.suffix != ".py" or not file.is_file():
        raise UserError(
            f"{key}: module {module_name} has no .py file, so that a change of the function would "
            "not be noticed; put it into a file of its own"
        )
    return function, hashlib.sha256(file.read_bytes()).hexdigest()
