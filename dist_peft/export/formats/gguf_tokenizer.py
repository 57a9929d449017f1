"""A Hugging Face tokenizer as GGUF metadata, so that llama.cpp cuts text as training did.

llama.cpp has its own tokenizers; a file names one and gives it tokens, types, and scores or merges:

    llama   SentencePiece's BPE: the best *score* of a neighbouring pair wins; unknown bytes fall
            back to <0x..> tokens
    gpt2    byte-level BPE: the first *merge* wins, inside pieces that a regular expression cuts;
            ``tokenizer.ggml.pre`` names the expression

A tokenizer that is neither, or cuts text by an expression that is not among the known ones, is
refused: it would run and give other tokens.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from dist_peft.core.errors import UserError

__all__ = ["add_tokenizer"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PRE = {
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    _GPT2: "gpt-2",
}
"""What cuts text into pieces -> llama.cpp's name for it."""

_UNUSED_SCORE = -1000.0


class _Token(NamedTuple):
    text: str
    score: float
    kind: gguf.TokenType


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocabulary: int) -> None:
    """Add the tokenizer of ``directory`` to a file.

    Args:
        writer: before its header is written.
        directory: holds ``tokenizer.json`` and what belongs to it.
        vocabulary: rows of the model's embedding; ids without a token get an unused one.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json, which a gguf file is made of")
    tree = json.loads(file.read_text())
    model = tree["model"]
    if model.get("type") != "BPE":
        raise _refused(file, f"it is of type {model.get('type')}")
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        scores = _merge_scores(model)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tree, file))
        scores = {}
    tokens = list(_tokens(tree, scores, vocabulary))
    writer.add_token_list([token.text for token in tokens])
    if scores:
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # pairs of texts are no concern
    special = gguf.SpecialVocab(directory, load_merges=not scores, n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)
    if scores:  # SentencePiece puts a space before the text, unless a normalizer does not
        writer.add_add_space_prefix("Prepend" in json.dumps(tree.get("normalizer")))


def _tokens(tree: dict[str, Any], scores: dict[str, float], vocabulary: int) -> Iterator[_Token]:
    """One token an id, 0 to ``vocabulary - 1``."""
    texts = {index: text for text, index in tree["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tree.get("added_tokens", [])}
    unknown = tree["model"].get("unk_token")
    for index in range(vocabulary):
        if index in added:
            text, special = added[index]["content"], added[index]["special"]
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            if text == unknown and scores:
                kind = gguf.TokenType.UNKNOWN
            yield _Token(text, 0.0, kind)
        elif index in texts:
            text = texts[index]
            is_byte = bool(scores) and len(text) == 6 and text.startswith("<0x")
            kind = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
            yield _Token(text, scores.get(text, 0.0), kind)
        else:
            yield _Token(f"[PAD{index}]", _UNUSED_SCORE, gguf.TokenType.UNUSED)


def _merge_scores(model: dict[str, Any]) -> dict[str, float]:
    """Token -> minus the rank of the merge that makes it; below all merges for single characters.

    SentencePiece merges the pair with the best score, byte-pair encoding the one that comes first:
    the same order.
    """
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    lowest = -float(len(model["merges"]))
    return {text: scores.get(text, lowest) for text in model["vocab"]}


def _pre_tokenizer(tree: dict[str, Any], file: Path) -> str:
    step = tree.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    patterns = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    byte_level = [s for s in steps if s.get("type") == "ByteLevel"]
    if len(byte_level) + len(patterns) < len(steps) or not byte_level or len(patterns) > 1:
        raise _refused(file, "it cuts text in steps that are not those of GPT-2, Llama 3 or Qwen 2")
    if byte_level[0].get("add_prefix_space"):
        raise _refused(file, "it adds a space before the text")
    if not patterns and byte_level[0].get("use_regex", True):
        return _PRE[_GPT2]
    pattern = patterns[0] if patterns else ""
    if pattern not in _PRE:
        raise _refused(file, f"it cuts text by {pattern!r}")
    return _PRE[pattern]


def _refused(file: Path, why: str) -> UserError:
    return UserError(
        f"{file} is no tokenizer that a gguf file can name ({why}); known are byte-level BPE as in "
        "GPT-2, Llama 3 and Qwen 2, and SentencePiece BPE with byte fallback. Choose another format"
    )
