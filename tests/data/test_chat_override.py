"""data.chat_template: text or file, instead of the tokenizer's, saved with the adapter."""

from pathlib import Path

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.chat_override import override_chat_template, read_chat_template
from dist_peft.data.documents import load_sequence_set
from dist_peft.data.sequence_text import format_sequence
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def test_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    assert read_chat_template(TEMPLATE) == read_chat_template(str(file)) == TEMPLATE


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read: no such file"), (b"chatml", "no chat template"), (b"\xff{{", "utf-8")],
)
def test_file_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "x.jinja").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_chat_template(str(tmp_path / "x.jinja"))


def test_tokenizer_is_copied_and_bad_jinja_refused() -> None:
    tokenizer = byte_tokenizer()
    assert override_chat_template(tokenizer, None) is tokenizer
    made = override_chat_template(tokenizer, TEMPLATE)
    assert made.chat_template == TEMPLATE and tokenizer.chat_template is None
    with pytest.raises(UserError, match=r"data\.chat_template is not valid Jinja"):
        override_chat_template(tokenizer, "{% for m in messages %}")
    picky = "{{ raise_exception('needs tools') }}"
    assert override_chat_template(tokenizer, picky).chat_template == picky


def test_conversations_are_rendered_with_it_and_it_is_kept(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = data_config(tmp_path / "cache", chat_template=TEMPLATE, seq_len=64)
    made = override_chat_template(tokenizer, TEMPLATE)
    rows = load_sequence_set(config, [source], made, name="train")
    assert format_sequence(rows, 0, made) == "[user]Hi[assistant][[Yo</s>]]"
    assert rows.chat_template == TEMPLATE  # goes into adapter/
    # the same template as the tokenizer's own is the base's, and another entry of the cache
    own = data_config(tmp_path / "cache", seq_len=64)
    assert load_sequence_set(own, [source], made, name="train").chat_template is None
    text = DataSource(path=str(write_jsonl(tmp_path / "b.jsonl", [{"text": "abc"}])))
    assert load_sequence_set(config, [text], made, name="train").chat_template is None


def test_error_names_the_key(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])))
    picky = "{{ raise_exception('needs tools') }}"
    config = data_config(tmp_path / "cache", chat_template=picky)
    made = override_chat_template(byte_tokenizer(), picky)
    with pytest.raises(UserError, match=r"chat template of data\.chat_template .*needs tools"):
        load_sequence_set(config, [source], made, name="train")
