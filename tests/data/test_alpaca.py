import json
from pathlib import Path
from typing import Any

import pytest

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.alpaca import build_alpaca_turns
from dist_peft.data.documents import load_sequence_set
from dist_peft.data.files import RecordPlace
from dist_peft.data.record_fields import RecordFields
from dist_peft.data.sequence_text import format_sequence
from tests.support.data_files import byte_tokenizer, data_config, write_jsonl

RECORD = {"instruction": "I", "output": "O"}


def turns(record: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    source = DataSource(path="a.jsonl", **settings)
    return build_alpaca_turns(RecordFields(source, {**RECORD, **record}, RecordPlace("a.jsonl", 1)))


def test_system_takes_the_place_of_the_first_sentences() -> None:
    asked = "\n\n### Instruction:\nI\n\n### Response:"
    assert turns({"system": "S"}) == [("S" + asked, "O")]
    assert turns({"s": "S"}, columns={"system": "s"}) == [("S" + asked, "O")]
    ((prompt, _),) = turns({"system": "S", "input": "X"})
    assert prompt == "S\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:"
    for nothing in ("", None, " "):
        ((prompt, _),) = turns({"system": nothing, "history": []})
        assert prompt.startswith("Below is an instruction") and prompt.endswith(asked)
    assert turns({"system": "S"}, ignore=["system"]) == turns({})


@pytest.mark.parametrize("encode", [list, json.dumps])
def test_history_is_earlier_turns(encode: Any) -> None:
    history = encode([["q", "a"], ["r", " "], ["t", "b"]])
    (first, second, last) = turns({"system": "S", "history": history})
    assert first == ("S\n\n### Instruction:\nq\n\n### Response:", "a")
    # an answer without a word is context, not a turn
    asked = "\n\n### Instruction:\nr\n\n### Response: \n\n### Instruction:\nt\n\n### Response:"
    assert second == (asked, "b")
    assert last == ("\n\n### Instruction:\nI\n\n### Response:", "O")


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"history": ["a", "b"]}, {}, r"history must be a list of \[instruction, response\] pairs"),
        ({"history": [["a", 7]]}, {}, r"column history.0.1 must be text but is int 7"),
        ({"history": "[["}, {}, "history is not valid JSON"),
        ({"history": {"a": "b"}}, {}, "history must be a list"),
        ({"system": ["s"]}, {}, "column system must be text but is list"),
        ({"system": "s"}, {"template": "{instruction}"}, "system would be missing from the prompt"),
        (
            {"h": [["a", "b"]]},
            {"template": "{instruction}", "columns": {"history": "h"}},
            r"column h would be missing from the prompt.*add \{h\} to it.*ignore: \[h\]",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    record: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"a.jsonl, record 1: .*{message}"):
        turns(record, **settings)


def test_a_template_may_write_the_system_prompt() -> None:
    assert turns({"system": "S"}, template="{system}|{instruction}|") == [("S|I|", "O")]
    assert turns({"system": "S"}, template="{instruction}", ignore=["system"]) == [("I", "O")]


def test_earlier_answers_contribute_to_the_loss_with_their_end(tmp_path: Path) -> None:
    record = {**RECORD, "system": "S", "history": [["q", "a"]]}
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [record, RECORD])))
    config = data_config(tmp_path / "cache", packing=False)
    tokenizer = byte_tokenizer()
    rows = load_sequence_set(config, [source], tokenizer, name="train")
    assert format_sequence(rows, 0, tokenizer) == (
        "<s>S\n\n### Instruction:\nq\n\n### Response:[[a</s>]]\n\n### Instruction:\nI\n\n"
        "### Response:[[O</s>]]"
    )
    assert rows.num_targets(0) == 4 and rows.num_targets(1) == 2
