"""The tokenizer in a GGUF file; llama.cpp itself cuts text in ``test_llama_cpp``."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers as tf

from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_tokenizer import _GPT2, _LLAMA3, _PRE, add_tokenizer_metadata
from tests.support.export_runs import TEXT, VOCABULARY, save_tokenizer
from tests.support.tiny_runs import save_words


def written(directory: Path, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    file = directory / "tokens.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer_metadata(writer, directory, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def change(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_byte_level(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    fields = written(tmp_path, VOCABULARY + 3)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == f"[PAD{VOCABULARY + 2}]"
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 1] and types[-1] == 5
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def make_steps(patterns: tuple[str, ...]) -> dict[str, Any]:
    """A pre-tokenizer that splits by the expressions in turn, as published files have them."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
        if p != _GPT2
    ]
    if len(patterns) == 2:
        steps = [{"type": "Digits", "individual_digits": True}]
    by_itself = _GPT2 in patterns
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_itself}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


@pytest.mark.parametrize("patterns", _PRE, ids=_PRE.values())
def test_cutting_expressions_are_named(patterns: tuple[str, ...], tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    steps = make_steps(patterns)
    change(tmp_path, pre_tokenizer=steps)
    assert written(tmp_path)["tokenizer.ggml.pre"] == _PRE[patterns]
    change(tmp_path, pre_tokenizer={**steps, "pretokenizers": steps["pretokenizers"] * 2})
    with pytest.raises(UserError, match="splits text by"):
        written(tmp_path)


def test_pieces_that_are_tokens_are_not_merged(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for whole, name in ((True, "llama-bpe"), (False, "dbrx")):
        settings = {**model, "ignore_merges": whole}
        change(tmp_path, pre_tokenizer=make_steps((_LLAMA3,)), model=settings)
        assert written(tmp_path)["tokenizer.ggml.pre"] == name


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        written(tmp_path)
    save_words(tmp_path)
    with pytest.raises(UserError, match=r"it is of type WordLevel.*Choose another format"):
        written(tmp_path)
    save_tokenizer(tmp_path)
    for step, words in (
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "adds a space"),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, "splits text by ''"),
        ({"type": "Whitespace"}, "splits text by Whitespace"),
        ({"type": "Digits", "individual_digits": True}, "its last step is Digits"),
    ):
        change(tmp_path, pre_tokenizer=step)
        with pytest.raises(UserError, match=words):
            written(tmp_path)


@pytest.mark.data
def test_sentencepiece_scores_are_in_the_order_of_merges(shared_data: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared_data / "stories260K-hf" / name).read_bytes())
    fields = written(tmp_path, 512)
    assert fields["tokenizer.ggml.model"] == "llama"
    types, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    places = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    pairs = [m if isinstance(m, list) else m.split(" ") for m in merges]
    made = [scores[places[left + right]] for left, right in pairs]
    assert made[0] == 0 and made == sorted(made, reverse=True)


_TOKENIZE = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(t.encode(), add_bos=True) for t in json.loads(sys.argv[2])]))
"""


@pytest.mark.e2e
@pytest.mark.llama_cpp
@pytest.mark.data
@pytest.mark.parametrize("source", ["byte-level", "sentencepiece"])
def test_llama_cpp_cuts_text_as_training_did(
    source: str, shared_data: Path, tmp_path: Path
) -> None:
    python = os.environ.get("DIST_PEFT_LLAMACPP_PYTHON")
    if python is None:
        pytest.skip("DIST_PEFT_LLAMACPP_PYTHON names no Python with llama-cpp-python")
    if source == "byte-level":
        save_tokenizer(tmp_path)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((shared_data / "stories260K-hf" / name).read_bytes())
    written(tmp_path, VOCABULARY if source == "byte-level" else 512)
    texts = [TEXT.strip(), "Once upon a time, there was a girl.\n\nDon't you 12345 naïve?", "a"]
    done = subprocess.run(
        [python, "-c", _TOKENIZE, tmp_path / "tokens.gguf", json.dumps(texts)],
        capture_output=True,
        text=True,
        check=True,
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads(done.stdout) == [tokenizer(text).input_ids for text in texts]
