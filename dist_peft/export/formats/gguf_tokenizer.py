"""Convert a Hugging Face tokenizer to GGUF metadata, so that llama.cpp tokenizes as training did.

llama.cpp implements its tokenizers; a file selects one and stores tokens, types, and scores or
merges:

    llama   SentencePiece BPE: the pair with the best *score* is merged; unknown bytes fall back
            to <0x..> tokens
    gpt2    byte-level BPE: the pair of the first *merge* is merged, inside pieces split by a
            regular expression that ``tokenizer.ggml.pre`` names

A tokenizer of another kind, or with an unknown regular expression, is refused: it would run but
return other tokens.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from dist_peft.core.errors import UserError

__all__ = ["add_tokenizer_metadata"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}|{_REST}"
)
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
_DIGITS = r"\p{N}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_PRE: dict[tuple[str, ...], str] = {
    (_LLAMA3,): "dbrx",
    (_LLAMA3.replace(r"\p{N}{1,3}", _DIGITS),): "qwen2",
    (_GPT2,): "gpt-2",
    (_GPT4O,): "gpt-4o",
    (_TEKKEN,): "tekken",
    (_DIGITS, _GPT2): "starcoder",
    _DEEPSEEK3: "deepseek-v3",
}
"""Regular expressions of the pre-tokenizer, in turn -> llama.cpp's name for them."""

_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""The name where a piece that is a token is not merged of others (``ignore_merges``)."""

_UNUSED_SCORE = -1000.0


class _GgufToken(NamedTuple):
    text: str
    score: float
    kind: gguf.TokenType


def add_tokenizer_metadata(writer: gguf.GGUFWriter, directory: Path, vocabulary: int) -> None:
    """Add the tokenizer of ``directory`` to a GGUF file.

    Args:
        writer: writer whose header is not yet written.
        directory: directory with ``tokenizer.json`` and the tokenizer's configuration.
        vocabulary: rows of the model's embedding; ids without a token get an unused one.

    Raises:
        UserError: llama.cpp has no equivalent tokenizer.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json, which a gguf file is made of")
    tree = json.loads(file.read_text())
    model = tree["model"]
    if model.get("type") != "BPE":
        raise _make_tokenizer_error(file, f"it is of type {model.get('type')}")
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        scores = _compute_merge_scores(model)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_find_pre_tokenizer(tree, file))
        scores = {}
    tokens = list(_iterate_tokens(tree, scores, vocabulary))
    writer.add_token_list([token.text for token in tokens])
    if scores:
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns about added token pairs
    special = gguf.SpecialVocab(directory, load_merges=not scores, n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)
    if scores:  # SentencePiece adds a space before the text only if a normalizer says so
        writer.add_add_space_prefix("Prepend" in json.dumps(tree.get("normalizer")))


def _iterate_tokens(
    tree: dict[str, Any], scores: dict[str, float], vocabulary: int
) -> Iterator[_GgufToken]:
    """Yield one token per id, from 0 to ``vocabulary - 1``."""
    texts = {index: text for text, index in tree["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tree.get("added_tokens", [])}
    unknown = tree["model"].get("unk_token")
    for index in range(vocabulary):
        if index in added:
            text, special = added[index]["content"], added[index]["special"]
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            if text == unknown and scores:
                kind = gguf.TokenType.UNKNOWN
            yield _GgufToken(text, 0.0, kind)
        elif index in texts:
            text = texts[index]
            is_byte = bool(scores) and len(text) == 6 and text.startswith("<0x")
            kind = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
            yield _GgufToken(text, scores.get(text, 0.0), kind)
        else:
            yield _GgufToken(f"[PAD{index}]", _UNUSED_SCORE, gguf.TokenType.UNUSED)


def _compute_merge_scores(model: dict[str, Any]) -> dict[str, float]:
    """Map each token to minus the rank of its merge; single characters score below all merges.

    SentencePiece merges the pair with the best score, byte-pair encoding the pair whose merge comes
    first: both orders are the same.
    """
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    lowest = -float(len(model["merges"]))
    return {text: scores.get(text, lowest) for text in model["vocab"]}


def _find_pre_tokenizer(tree: dict[str, Any], file: Path) -> str:
    step = tree.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    patterns = tuple(pattern for one in steps for pattern in _list_patterns(one, file))
    if steps[-1].get("type") != "ByteLevel":
        raise _make_tokenizer_error(file, f"its last step is {steps[-1].get('type')}")
    if patterns not in _PRE:
        raise _make_tokenizer_error(file, f"it splits text by {' and '.join(patterns)!r}")
    name = _PRE[patterns]
    return _WHOLE_WORDS.get(name, name) if tree["model"].get("ignore_merges") else name


def _list_patterns(step: dict[str, Any], file: Path) -> list[str]:
    """Return the expressions by which a step splits text."""
    kind, pattern = step.get("type"), step.get("pattern", {}).get("Regex")
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise _make_tokenizer_error(file, "it adds a space before the text")
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [_DIGITS]
    if kind == "Split" and pattern and not step.get("invert"):
        return [pattern]
    raise _make_tokenizer_error(file, f"it splits text by {kind}, which llama.cpp has not")


def _make_tokenizer_error(file: Path, why: str) -> UserError:
    return UserError(
        f"{file} cannot be converted to gguf ({why}); supported are byte-level BPE as in GPT-2, "
        "GPT-4o, Llama 3, Qwen 2, StarCoder, DeepSeek V3 and Mistral's Tekken, and SentencePiece "
        "BPE with byte fallback. Choose another format"
    )
