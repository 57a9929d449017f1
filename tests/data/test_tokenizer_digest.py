"""What makes another tokenizer, and what does not."""

import json
import shutil
from pathlib import Path

import pytest

from dist_peft.data.tokenizer_digest import compute_template_digest, compute_tokenizer_digest
from dist_peft.model.hub import load_tokenizer
from tests.support.tiny_runs import save_words


@pytest.fixture
def words(tmp_path: Path) -> Path:
    save_words(tmp_path / "a")
    return tmp_path / "a"


def test_place_and_last_call_do_not_matter(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "b")
    one, other = load_tokenizer(words), load_tokenizer(tmp_path / "b")
    other(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    assert compute_tokenizer_digest(one) == compute_tokenizer_digest(other)
    assert len(compute_tokenizer_digest(one)) == 32


def test_two_exchanged_ids_matter(words: Path) -> None:
    before = compute_tokenizer_digest(load_tokenizer(words))
    file = words / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["w50"], vocabulary["w51"] = vocabulary["w51"], vocabulary["w50"]
    file.write_text(json.dumps(tree))
    assert compute_tokenizer_digest(load_tokenizer(words)) != before


def test_special_tokens_matter(words: Path) -> None:
    one, other = load_tokenizer(words), load_tokenizer(words)
    other.eos_token = "w7"
    assert compute_tokenizer_digest(one) != compute_tokenizer_digest(other)


def test_template(words: Path) -> None:
    tokenizer = load_tokenizer(words)
    assert compute_template_digest(tokenizer) == "none"
    tokenizer.chat_template = "{{ messages }}"
    first = compute_template_digest(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert len({"none", first, compute_template_digest(tokenizer)}) == 3
