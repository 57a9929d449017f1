import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.cache import TokenDocuments
from dist_peft.data.examples import ChatExample, CompletionExample, TextExample
from dist_peft.data.files import RecordPlace
from dist_peft.data.sources import Example
from dist_peft.data.tokens import ExampleEncoder, LossOn, load_token_documents
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def pieces(
    tokenizer: PreTrainedTokenizerFast, example: Example, loss_on: LossOn = "completion"
) -> list[tuple[str, int]]:
    """(token, counts for the loss) of one example."""
    ((tokens, mask),) = ExampleEncoder(tokenizer, loss_on).encode_examples(
        [example], [RecordPlace("f", 1)]
    )
    assert tokens.dtype == np.int32
    assert mask.dtype == np.uint8
    words = [str(tokenizer.decode([t])) for t in tokens.tolist()]
    return list(zip(words, mask.tolist(), strict=True))


def test_completion_boundary_is_never_inside_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [w for w, _ in pieces(tokenizer, TextExample("abcd"))] == ["<s>", "a", "bc", "d", "</s>"]
    assert pieces(tokenizer, CompletionExample("ab", "cde")) == [
        ("<s>", 0),
        ("a", 0),
        ("b", 0),
        ("c", 1),
        ("de", 1),
        ("</s>", 1),
    ]


def test_loss_on_all_and_text(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = pieces(tokenizer, CompletionExample("a", "b"), "all")
    assert everything == [("<s>", 1), ("a", 1), ("b", 1), ("</s>", 1)]
    assert pieces(tokenizer, TextExample("a")) == [("<s>", 1), ("a", 1), ("</s>", 1)]


def test_empty_strings(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, CompletionExample("", "")) == [("<s>", 0), ("</s>", 1)]
    assert pieces(tokenizer, TextExample("")) == [("<s>", 1), ("</s>", 1)]


def test_bos_only_from_tokenizers_that_add_it(tokenizer: PreTrainedTokenizerFast) -> None:
    without = byte_tokenizer(bos=False)
    assert pieces(without, TextExample("a")) == [("a", 1), ("</s>", 1)]
    assert pieces(without, CompletionExample("a", "b")) == [("a", 0), ("b", 1), ("</s>", 1)]


def test_bos_and_eos_in_the_text_are_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, TextExample("<s>a</s>")) == [("<s>", 1), ("a", 1), ("</s>", 1)]
    assert pieces(tokenizer, CompletionExample("<s>a", "b</s>")) == [
        ("<s>", 0),
        ("a", 0),
        ("b", 1),
        ("</s>", 1),
    ]


def test_tokenizer_without_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no eos_token"):
        ExampleEncoder(tokenizer, "completion")


def test_tokenizer_without_tokenizer_json() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/base"

    with pytest.raises(UserError, match=r"tokenizer some/base \(Slow\) has no tokenizer.json"):
        ExampleEncoder(Slow(), "completion")  # type: ignore[arg-type]


def test_chat_mask_follows_characters_of_several_bytes() -> None:
    tokenizer = byte_tokenizer(specials=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    chat = ChatExample([{"role": "user", "content": "ü"}, {"role": "assistant", "content": "é🙂"}])
    ((tokens, mask),) = ExampleEncoder(tokenizer, "completion").encode_examples(
        [chat], [RecordPlace("f", 1)]
    )
    assert tokenizer.decode(tokens[mask == 1]) == "é🙂<|im_end|>"
    assert tokenizer.decode(tokens) == (
        "<|im_start|>user\nü<|im_end|>\n<|im_start|>assistant\né🙂<|im_end|>\n"
    )
    ((_, everything),) = ExampleEncoder(tokenizer, "all").encode_examples(
        [chat], [RecordPlace("f", 1)]
    )
    assert everything.all()


# -- the cache -----------------------------------------------------------------------------------


class Loads:
    """Loads one source through a cache; ``entries`` tells how often something was built."""

    def __init__(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.cache = tmp_path / "cache"
        self.tokenizer = tokenizer
        self.file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] * 3)

    def load(self, config: dict[str, Any] | None = None, **source: Any) -> TokenDocuments:
        return load_token_documents(
            data_config(self.cache, **(config or {})),
            DataSource(path=str(self.file), **source),
            self.tokenizer,
            "data.train[0]",
        )

    def entries(self) -> int:
        return len([d for d in (self.cache / "tokens").iterdir() if d.is_dir()])


@pytest.fixture
def loads(tmp_path: Path) -> Loads:
    return Loads(tmp_path, byte_tokenizer())


def test_windows_do_not_tokenize_again(loads: Loads) -> None:
    for config in ({}, {"seq_len": 64}, {"packing": False}, {"too_long": "truncate"}):
        assert len(loads.load(config)) == 3
    assert loads.entries() == 1


def test_what_changes_documents_tokenizes_again(loads: Loads) -> None:
    loads.load()
    loads.load({"loss_on": "all"})
    loads.load(limit=1)
    loads.load(template="x{prompt}")
    assert loads.entries() == 4
    loads.tokenizer.chat_template = CHATML
    loads.load()
    assert loads.entries() == 5
    loads.tokenizer = byte_tokenizer(bos=False)
    loads.load()
    assert loads.entries() == 6


def test_a_changed_file_is_read_again(loads: Loads) -> None:
    loads.load()
    write_jsonl(loads.file, [{"prompt": "p", "completion": "c"}] * 4)
    assert len(loads.load()) == 4
    before = loads.file.stat().st_mtime_ns
    write_jsonl(loads.file, [{"prompt": "p", "completion": "d"}] * 4)
    os.utime(loads.file, ns=(before + 1, before + 1))
    assert loads.tokenizer.decode(loads.load().tokens[:3]) == "<s>pd"


def test_use_of_the_tokenizer_does_not_change_the_key(loads: Loads) -> None:
    loads.load()
    loads.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    loads.load()
    assert loads.entries() == 1


def test_notes_are_heard_also_from_the_cache(
    loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    write_jsonl(loads.file, [{"messages": turns}] * 3)
    for _ in range(2):
        caplog.clear()
        loads.load()
        assert caplog.text.count("no chat template") == 1
    assert loads.entries() == 1


def test_more_records_than_a_batch_keep_their_places(loads: Loads) -> None:
    write_jsonl(loads.file, [{"text": str(i)} for i in range(1200)])
    documents = loads.load()
    assert len(documents) == 1200
    for i in (0, 511, 512, 1199):
        part = slice(int(documents.offsets[i]), int(documents.offsets[i + 1]))
        assert loads.tokenizer.decode(documents.tokens[part]) == f"<s>{i}</s>"
        assert documents.get_place(i) == RecordPlace(str(loads.file), i + 1)


def test_tokenizer_whose_call_does_more_is_called(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library alone is used only where it gives the same tokens as the tokenizer's call."""
    places = [RecordPlace("f", i) for i in range(2)]

    def encode(*batches: list[str]) -> list[list[int]]:
        encoder = ExampleEncoder(tokenizer, "all")
        found = [
            encoder.encode_examples([TextExample(t) for t in texts], places[: len(texts)])
            for texts in batches
        ]
        return [tokens.tolist() for part in found for tokens, _ in part]

    expected = encode(["abz"], ["abcz", "bz"])
    call = type(tokenizer).__call__

    def call_with_more(self: Any, texts: Any, **options: Any) -> Any:
        return call(self, [t + "z" for t in texts] if isinstance(texts, list) else texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", call_with_more)
    assert encode(["ab"], ["abc", "b"]) == expected


def test_truncation_of_the_tokenizers_file_does_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    try:
        encoder = ExampleEncoder(tokenizer, "all")
        for _ in range(2):  # by the call, then by the library
            ((tokens, _),) = encoder.encode_examples(
                [TextExample("xyzxyzxyzxyz")], [RecordPlace("f", 1)]
            )
            assert tokens.tolist()[-1] == tokenizer.eos_token_id and len(tokens) > 9
            tokenizer.backend_tokenizer.enable_truncation(3)
            tokenizer.backend_tokenizer.enable_padding(length=99)
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
