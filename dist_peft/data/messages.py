"""Normalize one message of a conversation (OpenAI or ShareGPT form) to role and content."""

from typing import Any

from dist_peft.core.errors import UserError

__all__ = ["check_unicode", "normalize_message"]

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def check_unicode(text: str, what: str) -> str:
    """Return ``text``.

    Args:
        what: names the text in the message.

    Raises:
        UserError: it cannot be encoded as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid Unicode: half a surrogate pair at character {error.start}"
        ) from None
    return text


def normalize_message(message: Any, where: str) -> dict[str, Any]:
    """Return ``message``, of OpenAI or ShareGPT form, as role, content and its other non-null keys.

    Raises:
        UserError: no object, no role, or content that is not text; ``where`` names the message.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where} is {type(message).__name__}, not an object")
    given = {name: value for name, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        speaker = given.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise UserError(
                f"{where} is from {speaker!r}; known are {', '.join(sorted(_SHAREGPT_ROLES))}"
            )
        given = {"role": _SHAREGPT_ROLES[speaker], "content": given.pop("value", None), **given}
    if not isinstance(given.get("role"), str) or not given["role"].strip():
        raise UserError(f"{where} has no role; its keys are {', '.join(message)}")
    if given.get("content") is None and given.get("tool_calls"):
        given.pop("content", None)
        return given
    if isinstance(given.get("content"), list):
        given["content"] = _join_content_parts(given["content"], f"{where} ({given['role']})")
    if not isinstance(given.get("content"), str):
        kind = type(given.get("content")).__name__.replace("NoneType", "null or missing")
        raise UserError(f"{where} ({given['role']}): content must be text but is {kind}")
    check_unicode(given["content"], where)
    return given


def _join_content_parts(parts: list[Any], where: str) -> str:
    """Join the texts of content parts without a separator, as templates for parts do."""
    texts = []
    for number, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: content must be text but is list with part {number} of type {kind}; "
                "only parts of type text are trained on: remove records with images or audio"
            )
        texts.append(part["text"])
    return "".join(texts)
