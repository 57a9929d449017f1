"""The tokens that end the assistant's turns, as the chat template writes them.

A model trained on conversations stops only if the token that closes its turn is a target, and
generation stops only if that token is among its stop tokens. Three kinds of templates occur::

    <|im_start|>assistant\\nHello<|im_end|>\\n     a closing token of its own
    [INST] Hi [/INST] Hello</s>                   the tokenizer's eos
    <|assistant|>\\nHello<|user|>\\n               the next role's marker (GLM-4)

They are distinguished by rendering a short conversation whose texts are marks (see ``marks``).
"""

from dataclasses import dataclass

from dist_peft.data.chat_template import ChatTemplate, Messages, RenderError
from dist_peft.data.marks import count_shared_prefix, find_position_after_mark, make_mark

__all__ = ["TurnEnds", "find_turn_ends"]


@dataclass(frozen=True)
class TurnEnds:
    """How a template ends assistant turns.

    Attributes:
        tokens: texts of all tokens that end a turn: ``<|im_end|>`` of ChatML whatever the
            tokenizer's eos is; ``<|user|>`` and ``<|observation|>`` of GLM-4; both ``<|end|>`` and
            ``<|endoftext|>`` of Phi-3, which closes a turn with the first and a conversation with
            the second. Empty where turns end with plain text or not at all.
        append: the next role's marker, where nothing closes the last turn of a conversation;
            appended to it, so that the model stops there as it does inside a conversation.
        append_call: the same for a turn that ends with a tool call.
    """

    tokens: tuple[str, ...]
    append: str | None = None
    append_call: str | None = None


def find_turn_ends(chat: ChatTemplate) -> TurnEnds:
    """Find the tokens that close a turn that answers the user, and one that calls a tool."""
    answer = _prepend_user_message(chat, {"role": "assistant", "content": make_mark(1)})
    user = {"role": "user", "content": make_mark(2)}
    inside, last = _find_closing_tokens(chat, answer, user, frozenset(chat.added_tokens))
    tokens = [token for token in (inside, last) if token]
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": make_mark(1), "arguments": {}},
    }
    calling = _prepend_user_message(
        chat, {"role": "assistant", "content": "", "tool_calls": [call]}
    )
    result = {"role": "tool", "content": make_mark(2), "tool_call_id": "call00000", "name": "f"}
    # </tool_call> and similar tokens that are not control tokens end only a part of the turn
    after_call, last_call = _find_closing_tokens(
        chat, calling, result, chat.special_tokens.union(tokens)
    )
    tokens += [token for token in (after_call, last_call) if token]
    return TurnEnds(
        tuple(dict.fromkeys(tokens)),
        append=inside if last is None else None,
        append_call=after_call if last_call is None else None,
    )


def _prepend_user_message(chat: ChatTemplate, message: dict[str, object]) -> Messages:
    return [{"role": "user", "content": make_mark(0)}, message]


def _find_closing_tokens(
    chat: ChatTemplate, turn: Messages, following: dict[str, str], known: frozenset[str]
) -> tuple[str | None, str | None]:
    """Return the tokens that end ``turn``'s last message inside and at the end of a conversation.

    Args:
        turn: its last message has mark 1.
        following: the next message, with mark 2.
        known: tokens that may end a turn.
    """
    alone = _find_tail(chat, turn, 1)
    inside = _find_tail(chat, [*turn, following], 1)
    if alone is None:
        return None, None
    last = _find_last_token(chat, alone, known)
    if inside is None:
        return None, last
    gap = inside[: inside.find(make_mark(2))] if make_mark(2) in inside else inside
    shared = count_shared_prefix(gap, alone, chat.token_pattern)
    closing = _find_last_token(chat, gap[:shared], known)
    if closing is None:
        found = chat.token_pattern.match(gap[shared:].lstrip())
        # a token that also opens the assistant's turns does not identify the next role
        if found and found[0] in known and found[0] not in _find_generation_prompt(chat):
            closing = found[0]
    return closing, last


def _find_generation_prompt(chat: ChatTemplate) -> str:
    """Return the text that opens an assistant turn; empty where that is unknown."""
    question = [{"role": "user", "content": make_mark(0)}]
    try:
        finished, opened = chat.render_text(question), chat.render_text(question, prompt=True)
    except RenderError:
        return ""
    return opened[count_shared_prefix(finished, opened, chat.token_pattern) :]


def _find_tail(chat: ChatTemplate, messages: Messages, number: int) -> str | None:
    """Return the rendered text after mark ``number``; None if the mark is not written."""
    try:
        text = chat.render_text(messages)
    except RenderError:
        return None
    after = find_position_after_mark(text, number)
    return None if after is None else text[after:]


def _find_last_token(chat: ChatTemplate, text: str, known: frozenset[str]) -> str | None:
    found = [match[0] for match in chat.token_pattern.finditer(text) if match[0] in known]
    return found[-1] if found else None
