from typing import Any

from dist_peft.data.chat_pieces import (
    find_marked_tail,
    find_text_pieces,
    insert_marks,
    locate_text_pieces,
)
from dist_peft.data.chat_template import ChatTemplate
from dist_peft.data.marks import MARK
from tests.support.chat_families import FAMILIES

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": " ask </think> "},
    {
        "role": "assistant",
        "content": "<think>same</think> same ",
        "reasoning_content": "  ",
        "tool_calls": [{"function": {"name": "f1"}}, {"name": "f2"}, "odd"],
    },
]


def test_texts_of_messages() -> None:
    pieces = find_text_pieces(MESSAGES)
    assert [(p.message, p.key, p.text, p.call) for p in pieces] == [
        (0, "content", "ask </think>", 0),
        (1, "<think>", "same", 0),
        (1, "content", "same", 0),
        (1, "tool_calls", "f1", 0),
        (1, "tool_calls", "f2", 1),
    ]


def test_marks_go_into_the_middle() -> None:
    (_, message) = insert_marks(MESSAGES, find_text_pieces(MESSAGES))
    shown = MARK.sub("|", message["content"])
    assert shown == "<think>sa|me</think> sa|me "
    assert MARK.sub("|", message["tool_calls"][1]["name"]) == "f|2"
    assert "|" not in MESSAGES[1]["content"]


def test_places_and_what_is_dropped() -> None:
    chat = ChatTemplate(FAMILIES["qwen3"].tokenizer())
    messages = [
        {"role": "user", "content": "<tool_response>xy</tool_response>"},
        {"role": "assistant", "content": "<think>why</think>\n\nso"},
        {"role": "user", "content": "next"},
        {"role": "assistant", "content": "<think>again</think>\n\nend"},
    ]
    text = chat.render_text(messages)
    pieces = find_text_pieces(messages)
    places = locate_text_pieces(chat, messages, None, text, pieces)
    assert places is not None
    written = {pieces[number].text for number in places}
    assert {piece.text for piece in pieces} - written == {"why"}
    for number, place in places.items():
        piece = pieces[number]
        start = place - piece.middle_offset
        assert text[start : start + len(piece.text)] == piece.text
    last = pieces[-1].number
    tail = find_marked_tail(chat, messages, None, pieces, last, prompt=True)
    assert tail == "nd<|im_end|>\n<|im_start|>assistant\n"


def test_template_that_marks_change() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = "{{ messages[0].content | length }}"
    chat = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "abc"}]
    assert locate_text_pieces(chat, messages, None, "3", find_text_pieces(messages)) is None
