"""Arguments of tool calls: an object, or the JSON text of one as OpenAI's format has it.

Templates with ``tojson`` encode text a second time, others join text and fail on an object. So
arguments are given as an object first, and as text to a template that does not take one.
"""

import json
from collections.abc import Callable
from typing import Any

__all__ = ["arguments_as_objects", "arguments_as_text", "writes_python_form"]

Message = dict[str, Any]


def arguments_as_objects(messages: list[Message]) -> list[Message]:
    """Messages in which arguments that are the JSON text of an object are that object.

    Text is decoded once: what it holds stays as it is, and text that holds no object stays text.
    """
    return [_with_arguments(message, _decoded) for message in messages]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Messages in which arguments that are an object are its JSON text."""
    return [_with_arguments(message, _encoded) for message in messages]


def writes_python_form(text: str, messages: list[Message]) -> bool:
    """Whether ``text`` holds an object of arguments as Python prints it (``{'a': 1}``)."""
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
