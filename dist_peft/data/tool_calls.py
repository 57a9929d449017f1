"""Convert tool calls to the form that a chat template accepts.

Arguments are an object, or the JSON text of one as in OpenAI's format: templates with ``tojson``
encode text a second time, others concatenate text and fail on an object. The content of a message
with a call is null, missing or empty: some templates open a separate turn for non-null content,
others write ``None``. Tools are described with or without ``{"type": "function", "function": ...}``
around them. The first form that the template renders without these faults is used.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.chat_template import ChatTemplate, RenderError, Tools

__all__ = [
    "arguments_as_objects",
    "arguments_as_text",
    "check_calls",
    "render_calls",
    "writes_python_form",
]

Message = dict[str, Any]


def check_calls(messages: list[Message], where: str) -> None:
    """Check that every tool call names a function.

    Raises:
        UserError: one does not, or a call is under ``function_call``; ``where`` names the record.
    """
    for number, message in enumerate(messages, start=1):
        if message.get("function_call"):
            raise UserError(
                f"{where}, message {number}: function_call is an older form that chat templates "
                "do not write; write tool_calls: [{function: {name, arguments}}] instead"
            )
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else [calls] if calls else []:
            function = call.get("function", call) if isinstance(call, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(calls, list) or not isinstance(name, str) or not name.strip():
                raise UserError(
                    f"{where}, message {number}: tool_calls must be a list of objects with "
                    f"function: {{name, arguments}}, not {calls!r:.80}"
                )


def render_calls(
    chat: ChatTemplate, messages: list[Message], tools: Tools | None
) -> tuple[list[Message], Tools | None, str]:
    """Return messages and tools in the first form that the template accepts, and the text.

    Raises:
        RenderError: it accepts none.
    """
    refusal: RenderError | None = None
    wrapped = _wrapped(tools)
    for described in [tools] if wrapped == tools else [tools, wrapped]:
        for form in _forms(messages):
            try:
                text = chat.render(form, described)
            except RenderError as error:
                refusal = refusal or error
                continue
            if writes_python_form(text, form):
                refusal = refusal or RenderError("it writes arguments as Python prints them")
            elif not _writes_none(chat, form, described, text):
                return form, described, text
    assert refusal is not None
    raise refusal


def _wrapped(tools: Tools | None) -> Tools | None:
    """Return the tools in the form of OpenAI's API."""
    if tools is None:
        return None
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    objects = arguments_as_objects(messages)
    texts = arguments_as_text(objects)
    for form in [objects] if texts == objects else [objects, texts]:
        yield _with_content(form, None)
        if _with_content(form, "") != form or _with_content(form, None) != form:
            yield _with_content(form, "")


def _with_content(messages: list[Message], content: str | None) -> list[Message]:
    """Set ``content`` in messages that call tools and have no other text."""
    return [
        {**message, "content": content}
        if message.get("tool_calls") and not str(message.get("content") or "").strip()
        else message
        for message in messages
    ]


def _writes_none(chat: ChatTemplate, form: list[Message], tools: Tools | None, text: str) -> bool:
    if "None" not in text or _with_content(form, None) != form:
        return False
    try:
        return text.count("None") > chat.render(_with_content(form, ""), tools).count("None")
    except RenderError:
        return False


def arguments_as_objects(messages: list[Message]) -> list[Message]:
    """Return the messages with arguments that are the JSON text of an object parsed to the object.

    Text is parsed once: strings inside it are kept, and text that is not an object stays text.
    """
    return [_with_arguments(message, _decoded) for message in messages]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Return the messages with arguments that are an object as its JSON text."""
    return [_with_arguments(message, _encoded) for message in messages]


def writes_python_form(text: str, messages: list[Message]) -> bool:
    """Return whether ``text`` has an object of arguments as Python prints it (``{'a': 1}``)."""
    found: list[str] = []

    def look(arguments: Any) -> Any:
        if isinstance(arguments, dict) and arguments:
            found.append(repr(arguments))
        return arguments

    for message in messages:
        _with_arguments(message, look)
    return any(form in text for form in found)


def _decoded(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _encoded(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_changed_call(call, change) for call in calls]}


def _changed_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _changed_call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
