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
from dist_peft.data.marks import mark, position_after, shared_markers

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
    answer = _user_and(chat, {"role": "assistant", "content": mark(1)})
    user = {"role": "user", "content": mark(2)}
    inside, last = _closers(chat, answer, user, frozenset(chat.added_tokens))
    tokens = [token for token in (inside, last) if token]
    call = {"id": "call00000", "type": "function", "function": {"name": mark(1), "arguments": {}}}
    calling = _user_and(chat, {"role": "assistant", "content": "", "tool_calls": [call]})
    result = {"role": "tool", "content": mark(2), "tool_call_id": "call00000", "name": "f"}
    # </tool_call> and similar tokens that are not control tokens end only a part of the turn
    after_call, last_call = _closers(chat, calling, result, chat.special_tokens.union(tokens))
    tokens += [token for token in (after_call, last_call) if token]
    return TurnEnds(
        tuple(dict.fromkeys(tokens)),
        append=inside if last is None else None,
        append_call=after_call if last_call is None else None,
    )


def _user_and(chat: ChatTemplate, message: dict[str, object]) -> Messages:
    return [{"role": "user", "content": mark(0)}, message]


def _closers(
    chat: ChatTemplate, turn: Messages, following: dict[str, str], known: frozenset[str]
) -> tuple[str | None, str | None]:
    """Return the tokens that end ``turn``'s last message inside and at the end of a conversation.

    Args:
        turn: its last message has mark 1.
        following: the next message, with mark 2.
        known: tokens that may end a turn.
    """
    alone = _tail(chat, turn, 1)
    inside = _tail(chat, [*turn, following], 1)
    if alone is None:
        return None, None
    last = _last_token(chat, alone, known)
    if inside is None:
        return None, last
    gap = inside[: inside.find(mark(2))] if mark(2) in inside else inside
    shared = shared_markers(gap, alone, chat.token_pattern)
    closing = _last_token(chat, gap[:shared], known)
    if closing is None:
        found = chat.token_pattern.match(gap[shared:].lstrip())
        # a token that also opens the assistant's turns does not identify the next role
        if found and found[0] in known and found[0] not in _generation_prompt(chat):
            closing = found[0]
    return closing, last


def _generation_prompt(chat: ChatTemplate) -> str:
    """Return the text that opens an assistant turn; empty where that is unknown."""
    question = [{"role": "user", "content": mark(0)}]
    try:
        finished, opened = chat.render(question), chat.render(question, prompt=True)
    except RenderError:
        return ""
    return opened[shared_markers(finished, opened, chat.token_pattern) :]


def _tail(chat: ChatTemplate, messages: Messages, number: int) -> str | None:
    """Return the rendered text after mark ``number``; None if the mark is not written."""
    try:
        text = chat.render(messages)
    except RenderError:
        return None
    after = position_after(text, number)
    return None if after is None else text[after:]


def _last_token(chat: ChatTemplate, text: str, known: frozenset[str]) -> str | None:
    found = [match[0] for match in chat.token_pattern.finditer(text) if match[0] in known]
    return found[-1] if found else None
