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
    "check_tool_calls",
    "parse_tool_arguments",
    "render_tool_calls",
    "serialize_tool_arguments",
    "writes_python_form",
]

Message = dict[str, Any]


def check_tool_calls(messages: list[Message], where: str) -> None:
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


def render_tool_calls(
    chat: ChatTemplate, messages: list[Message], tools: Tools | None
) -> tuple[list[Message], Tools | None, str]:
    """Return messages and tools in the first form that the template accepts, and the text.

    Raises:
        RenderError: it accepts none.
    """
    refusal: RenderError | None = None
    wrapped = _wrap_tools(tools)
    for described in [tools] if wrapped == tools else [tools, wrapped]:
        for form in _iterate_message_forms(messages):
            try:
                text = chat.render_text(form, described)
            except RenderError as error:
                refusal = refusal or error
                continue
            if writes_python_form(text, form):
                refusal = refusal or RenderError("it writes arguments as Python prints them")
            elif not _writes_none_literal(chat, form, described, text):
                return form, described, text
    assert refusal is not None
    raise refusal


def _wrap_tools(tools: Tools | None) -> Tools | None:
    """Return the tools in the form of OpenAI's API."""
    if tools is None:
        return None
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _iterate_message_forms(messages: list[Message]) -> Iterator[list[Message]]:
    objects = parse_tool_arguments(messages)
    texts = serialize_tool_arguments(objects)
    for form in [objects] if texts == objects else [objects, texts]:
        yield _fill_empty_content(form, None)
        if _fill_empty_content(form, "") != form or _fill_empty_content(form, None) != form:
            yield _fill_empty_content(form, "")


def _fill_empty_content(messages: list[Message], content: str | None) -> list[Message]:
    """Set ``content`` in messages that call tools and have no other text."""
    return [
        {**message, "content": content}
        if message.get("tool_calls") and not str(message.get("content") or "").strip()
        else message
        for message in messages
    ]


def _writes_none_literal(
    chat: ChatTemplate, form: list[Message], tools: Tools | None, text: str
) -> bool:
    if "None" not in text or _fill_empty_content(form, None) != form:
        return False
    try:
        return text.count("None") > chat.render_text(_fill_empty_content(form, ""), tools).count(
            "None"
        )
    except RenderError:
        return False


def parse_tool_arguments(messages: list[Message]) -> list[Message]:
    """Return the messages with arguments that are the JSON text of an object parsed to the object.

    Text is parsed once: strings inside it are kept, and text that is not an object stays text.
    """
    return [_map_message_arguments(message, _decode_json_object) for message in messages]


def serialize_tool_arguments(messages: list[Message]) -> list[Message]:
    """Return the messages with arguments that are an object as its JSON text."""
    return [_map_message_arguments(message, _encode_json_object) for message in messages]


def writes_python_form(text: str, messages: list[Message]) -> bool:
    """Return whether ``text`` has an object of arguments as Python prints it (``{'a': 1}``)."""
    found: list[str] = []

    def check_arguments(arguments: Any) -> Any:
        if isinstance(arguments, dict) and arguments:
            found.append(repr(arguments))
        return arguments

    for message in messages:
        _map_message_arguments(message, check_arguments)
    return any(form in text for form in found)


def _decode_json_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _encode_json_object(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _map_message_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_map_call_arguments(call, change) for call in calls]}


def _map_call_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _map_call_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
