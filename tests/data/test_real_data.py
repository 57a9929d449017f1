"""Real files through the real tokenizer, from path to rows: what is learnt, read as text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data import SequenceSet, format_sequence, load_sequence_set
from dist_peft.data.packing import IGNORE
from tests.support.data_files import data_config

pytestmark = [pytest.mark.data, pytest.mark.e2e]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        shared_data / "stories260K-hf"
    )
    return tokenizer


class Load:
    def __init__(self, data: Path, cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.data, self.cache, self.tokenizer = data, cache, tokenizer

    def rows(self, path: str, config: dict[str, Any], **source: Any) -> SequenceSet:
        sources = [DataSource(path=str(self.data / path), **source)]
        rows = load_sequence_set(
            data_config(self.cache, **config), sources, self.tokenizer, name="train"
        )
        for i in range(0, len(rows), 97):
            _, labels, _ = rows.get_sequence(i)
            assert int((labels != IGNORE).sum()) == rows.num_targets(i) > 0
        return rows

    def first(self, path: str, config: dict[str, Any] | None = None, **source: Any) -> str:
        rows = self.rows(path, {"seq_len": 16384, "packing": False, **(config or {})}, **source)
        return format_sequence(rows, 0, self.tokenizer)


@pytest.fixture
def load(shared_data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Load:
    return Load(shared_data, tmp_path, tokenizer)


def test_gsm8k(load: Load) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    rows = load.rows("gsm8k/test.jsonl", {"seq_len": 2048}, columns=columns)
    assert rows.num_documents == 1319
    assert rows.total_tokens / (len(rows) * 2048) > 0.98
    shown = load.first("gsm8k/test.jsonl", columns=columns, template="Q: {question}\nA:", limit=1)
    assert shown.startswith("<s> Q: Janet\u2019s ducks lay 16 eggs per day.")
    assert "market?\nA:[[Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n" in shown
    assert shown.endswith("#### 18</s>]]")
    guessed = load.first("gsm8k/test.jsonl", limit=1)
    assert "[[Janet sells 16 - 3 - 4" in guessed and guessed.endswith("#### 18</s>]]")


def test_tinystories(load: Load) -> None:
    shown = load.first("tinystories-1000/tinystories_clean.jsonl")
    assert shown.startswith("<s>[[One day, a little girl named Lily found a needle in her room.")
    assert shown.endswith("shared and worked together.</s>]]")
    plain = load.rows("tinystories-1000/tinystories_clean.jsonl", {"packing": False})
    listed = load.rows("tinystories-1000/tinystories_clean.json", {"packing": False})
    assert len(plain) == len(listed) == 1000
    for i in (0, 500, 999):
        assert all(
            torch.equal(a, b)
            for a, b in zip(plain.get_sequence(i), listed.get_sequence(i), strict=True)
        )
    packed = load.rows("tinystories-1000/tinystories_1000.json", {"seq_len": 512})
    assert packed.num_documents > 1000
    assert len(packed) < packed.num_documents


def test_alpaca(load: Load) -> None:
    shown = load.first("llamafactory-demo/identity.json")
    assert shown == (
        f"<s> {ALPACA}hi\n\n### Response:[[Hello! I am {{{{name}}}}, an AI assistant developed by "
        "{{author}}. How can I assist you today?</s>]]"
    )
    assert "### Response:[[Making crepes" in load.first("llamafactory-demo/alpaca_en_demo.json")


def test_self_instruct_needs_nested_columns(load: Load) -> None:
    with pytest.raises(UserError, match=r"columns are id, name, instruction, instances, is_class"):
        load.first("self-instruct/seed_tasks.jsonl")
    columns = {"input": "instances.0.input", "output": "instances.0.output"}
    shown = load.first("self-instruct/seed_tasks.jsonl", columns=columns)
    assert shown.startswith(f"<s> {ALPACA}Is there anything I can eat for a breakfast")
    assert "### Response:[[Yes, you can have 1 oatmeal" in shown


def test_tool_calls_in_sharegpt_form(load: Load) -> None:
    shown = load.first("llamafactory-demo/glaive_toolcall_en_demo.json")
    assert shown.startswith('<s> <|tools|>\n{"name": "search_recipes", "description":')
    assert "}\n<|user|>\nHi, I have some ingredients" in shown
    assert '<|assistant|>\n[[{"name": "search_recipes",' in shown
    assert '"rice"]}}</s>]]\n<|tool|>\n{"recipes": [' in shown
    assert shown.count("[[Of course!") == 1


def test_preference_data(load: Load) -> None:
    with pytest.raises(UserError, match=r"kto_en_demo.json, record \d+: column label is False"):
        load.first("llamafactory-demo/kto_en_demo.json")
    shown = load.first("llamafactory-demo/kto_en_demo.json", ignore=["label"])
    assert "I think the answer is\n<|assistant|>\n[[Ooh ooh ah ah!" in shown
    with pytest.raises(UserError, match=r"record 1: column chosen belongs to preference data"):
        load.first("llamafactory-demo/dpo_en_demo.json")
    columns = {"prompt": "conversations", "completion": "chosen"}  # what the message says
    shown = load.first("llamafactory-demo/dpo_en_demo.json", columns=columns)
    assert "<|assistant|>\n[[That sounds like a fun and engaging idea!" in shown


READ_AS_IT_IS = {
    "commonsense/*/*.json": "### Response:[[the correct answer is answer3</s>]]",
    "llamafactory-demo/alpaca_en_demo.json": "### Response:[[Making crepes",
    "llamafactory-demo/c4_demo.jsonl": "<s>[[Don\u2019t think you need all the bells",
    "llamafactory-demo/wiki_demo.txt": "<s>[[Anarchism is a political philosophy",
    "tinystories-1000/wikitext_1000.json": "<s>[[= Valkyria Chronicles III =",
    "wikitext2": "is an English film , television and theatre actor",
}
REFUSED = {
    "rte/*.tsv": r"columns are index, sentence1, .*classifier on label .*format: classification",
    "mrpc/*.tsv": r"columns are Quality, #1 ID, .*classification needs text, label, text_pair\?",
    "mrpc/LICENCE.html": r"has the ending .html; readable are .jsonl",
    "self-instruct/*.jsonl": r"\{output: a_column\}; .* is written instances.0.output",
    "llamafactory-demo": r"c4_demo.jsonl, record 1 has no column instruction .*is of format alpaca",
    "commonsense": r"has no file with a readable ending .*; it has .md",
    "nowhere.json": r"nowhere.json does not exist",
}


@pytest.mark.parametrize("path", READ_AS_IT_IS)
def test_files_that_need_no_setting(load: Load, path: str) -> None:
    shown = load.first(path, {"seq_len": 2048}, limit=1)
    assert READ_AS_IT_IS[path] in shown


@pytest.mark.parametrize("path", REFUSED)
def test_files_that_need_one_are_refused_with_it(load: Load, path: str) -> None:
    with pytest.raises(UserError, match=REFUSED[path]):
        load.first(path)


def test_generation_marks_and_rendering_piece_by_piece_agree(load: Load) -> None:
    """The template of the tokenizer's own mark, and the same without, give the same rows."""
    written = "{{ m.content + '<|im_end|>' }}"
    plain = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + written
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    marked = plain.replace(written, "{% generation %}" + written + "{% endgeneration %}", 1)
    load.tokenizer = AutoTokenizer.from_pretrained(load.data / "stories260K-hf")
    load.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made = []
    for template in (plain, marked):
        load.tokenizer.chat_template = template
        config = {"seq_len": 16384, "packing": False}
        made.append(load.rows("llamafactory-demo/glaive_toolcall_en_demo.json", config, limit=60))
    for i in range(len(made[0])):
        pairs = zip(made[0].get_sequence(i), made[1].get_sequence(i), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_text_file_is_one_document_in_windows(load: Load) -> None:
    rows = load.rows("tinyshakespeare/input.txt", {"seq_len": 512, "packing": False})
    assert format_sequence(rows, 0, load.tokenizer).startswith(
        "<s>[[First Citizen:\nBefore we proceed"
    )
    assert all(rows.num_tokens(i) == 512 for i in range(len(rows) - 1))
    assert rows.total_targets == rows.total_tokens - len(rows)


@pytest.mark.parametrize(
    ("path", "source", "learnt"),
    [
        (
            "rte/train.tsv",
            {"columns": {"completion": "label"}, "template": "{sentence1}\n{sentence2}\n"},
            "[[not_entailment</s>]]",
        ),
        (
            "mrpc/msr-para-train.tsv",
            {"columns": {"completion": "Quality"}, "template": "{#1 String}\n{#2 String}\n"},
            "[[1</s>]]",
        ),
    ],
)
def test_tables(load: Load, path: str, source: dict[str, Any], learnt: str) -> None:
    assert load.first(path, **source).endswith(learnt)
