"""Formats of records: which columns each reads, its detection, and the example of a record.

============== ========================================== ====================================
format         roles                                      example
============== ========================================== ====================================
chat           messages (or conversations), tools?        [{role, content}] or [{from, value}]
completion     prompt, completion, tools?, system?        context and target text; or messages
alpaca         instruction, input?, output, system?,      put into the Alpaca prompt
               history?
text           text                                       a document, loss on every token
classification text, text_pair?, label                    one or two texts and their class
============== ========================================== ====================================

A role reads the column of the same name unless ``columns`` names another; a name with dots
(``instances.0.output``) indexes nested records. ``auto`` selects the first format of the table
whose required roles are all present; ``classification`` has to be named.
"""

import difflib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.alpaca import ALPACA_OPTIONAL, build_alpaca_turns
from dist_peft.data.blank_turns import exclude_turn
from dist_peft.data.column_guess import guess_columns
from dist_peft.data.column_hints import (
    list_nested_columns,
    suggest_column_names,
    suggest_columns,
)
from dist_peft.data.examples import (
    ChatExample,
    CompletionExample,
    Example,
    LabelledExample,
    TextExample,
)
from dist_peft.data.messages import normalize_message
from dist_peft.data.record_blocks import Record
from dist_peft.data.record_fields import (
    MISSING,
    RecordFields,
    get_column_value,
    parse_template_fields,
)

__all__ = ["RECORD_FORMATS", "RecordFormat", "choose_record_format", "recognize_source"]


# -- one record ----------------------------------------------------------------------------------


def _parse_completion(fields: RecordFields) -> Example:
    template = fields.source.template
    prompt_value, answer = fields.get_raw_value("prompt"), fields.get_raw_value("completion")
    if template is None and isinstance(prompt_value, list) and isinstance(answer, list | dict):
        answer = answer if isinstance(answer, list) else [answer]
        where = f"{fields.place}, message"
        before = [
            normalize_message(m, f"{where} {i} of prompt") for i, m in enumerate(prompt_value, 1)
        ]
        after = [
            normalize_message(m, f"{where} {i} of completion") for i, m in enumerate(answer, 1)
        ]
        # only the completion contributes to the loss
        before = [exclude_turn(m) if m["role"] == "assistant" else m for m in before]
        return ChatExample(_prepend_system_message(before + after, fields), _parse_tools(fields))
    if (fields.get_raw_value("tools") or "[]") not in (MISSING, "[]"):
        raise UserError(
            f"{fields.place}: column tools is for conversations, and prompt is text; write the "
            "record as messages, or leave the column out with ignore: "
            f"[{fields.column_of_role('tools')}]"
        )
    named = parse_template_fields(template)
    if (
        fields.get_optional_text("system")
        and not {"system", fields.column_of_role("system")} & named
    ):
        raise UserError(
            f"{fields.place}: column {fields.column_of_role('system')} would be missing from "
            "the prompt; "
            f"write it with the source's template, such as "
            f'"{{{fields.column_of_role("system")}}}\\n{{...}}", or leave the column out '
            "with ignore: "
            f"[{fields.column_of_role('system')}]"
        )
    prompt = fields.fill_template(template) if template is not None else fields.get_text("prompt")
    return CompletionExample(prompt, fields.get_text("completion"))


def _parse_alpaca(fields: RecordFields) -> CompletionExample:
    *earlier, (prompt, output) = build_alpaca_turns(fields)
    return CompletionExample(prompt, output, tuple(earlier))


def _parse_text(fields: RecordFields) -> TextExample:
    return TextExample(fields.get_text("text"))


def _parse_labelled(fields: RecordFields) -> LabelledExample:
    columns, labels = fields.source.columns, fields.source.labels
    paired = "text_pair" in columns or fields.get_raw_value("text_pair") is not MISSING
    if not labels:  # a source of a domain
        pair = fields.get_text("text_pair") if paired else None
        return LabelledExample(fields.get_text("text"), pair, -1)
    value = fields.get_raw_value("label")
    # JSON has numbers and booleans where tables have text
    plain = value is MISSING or isinstance(value, str)
    label = fields.get_text("label") if plain else json.dumps(value, default=str)
    if label not in labels:
        raise UserError(
            f"{fields.place}: column {columns.get('label', 'label')} is {label!r}, which is none "
            f"of the labels {', '.join(labels)}; add it to the source's labels, or fix the record"
        )
    pair = fields.get_text("text_pair") if paired else None
    return LabelledExample(fields.get_text("text"), pair, labels.index(label))


def _parse_chat(fields: RecordFields) -> ChatExample:
    messages = fields.get_raw_value("messages")
    if messages is MISSING and "messages" not in fields.source.columns:
        messages = fields.get_raw_value("conversations")
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{fields.place}: messages is not valid JSON: {error}") from None
    if not isinstance(messages, list) or not messages:
        column = fields.source.columns.get("messages")
        raise UserError(
            f"{fields.place}: {f'column {column} as ' if column else ''}messages must be a list of "
            f"at least one message but is {type(messages).__name__} {messages!r:.40}"
        )
    where = f"{fields.place}, message"
    normal = [
        normalize_message(message, f"{where} {i}") for i, message in enumerate(messages, start=1)
    ]
    return ChatExample(_prepend_system_message(normal, fields), _parse_tools(fields))


def _prepend_system_message(
    messages: list[dict[str, Any]], fields: RecordFields
) -> list[dict[str, Any]]:
    """Return ``messages`` with the text of column ``system`` in front, if there is one.

    Raises:
        UserError: they begin with another system message.
    """
    system = fields.get_optional_text("system")
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise UserError(
            f"{fields.place}: column system and the system message differ; remove one of them"
        )
    return messages


def _parse_tools(fields: RecordFields) -> list[dict[str, Any]] | None:
    """Return the tool descriptions: a list of JSON schemas, or parsed from its JSON text."""
    tools = fields.get_raw_value("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{fields.place}: column tools is not valid JSON: {error}") from None
    if tools in (None, MISSING) or not tools or not str(tools).strip():
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{fields.place}: column tools must be a list of objects")
    return tools


# -- formats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordFormat:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[RecordFields], Example]
    # the role whose text source.template replaces, if the format accepts a template
    templated: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def list_roles(self) -> set[str]:
        return {*self.required, *self.optional}

    def list_required_roles(self, source: DataSource) -> list[str]:
        """Return the roles that must be in every record."""
        return [r for r in self.required if source.template is None or r != self.templated]

    def list_required_columns(self, source: DataSource) -> list[str]:
        return [source.columns.get(role, role) for role in self.list_required_roles(source)]

    def list_missing_columns(self, required: list[str], record: Record) -> list[str]:
        """Return those of the ``required`` columns that ``record`` does not have."""
        return [
            column
            for column in required
            if column not in record
            and get_column_value(record, column) is MISSING
            and self.aliases.get(column) not in record
        ]

    def describe_columns(self) -> str:
        names = [f"{r} or {self.aliases[r]}" if r in self.aliases else r for r in self.required]
        return f"{self.name} needs {', '.join(names + [f'{o}?' for o in self.optional])}"


RECORD_FORMATS = (
    RecordFormat(
        "chat",
        ("messages",),
        ("tools", "system"),
        _parse_chat,
        aliases={"messages": "conversations"},
    ),
    RecordFormat(
        "completion",
        ("prompt", "completion"),
        ("tools", "system"),
        _parse_completion,
        templated="prompt",
    ),
    RecordFormat(
        "alpaca", ("instruction", "output"), ALPACA_OPTIONAL, _parse_alpaca, templated="instruction"
    ),
    RecordFormat("text", ("text",), (), _parse_text),
)
_CLASSIFICATION = RecordFormat("classification", ("text", "label"), ("text_pair",), _parse_labelled)
_UNLABELLED = RecordFormat("classification", ("text",), ("text_pair",), _parse_labelled)


def recognize_source(
    source: DataSource, record: Record, file: str, key: str
) -> tuple[DataSource, RecordFormat, str | None]:
    """Return ``source`` with guessed columns, its format, and a note about the guess.

    Raises:
        UserError: settings that fit no format, or a record whose format is not recognized.
    """
    try:
        return source, choose_record_format(source, record, file, key), None
    except UserError:
        columns = guess_columns(source, record)
        if not columns:
            raise
    guessed = source.model_copy(update={"columns": columns})
    said = " and ".join(f"{column} as {role}" for role, column in columns.items())
    mapped = ", ".join(f"{role}: {column}" for role, column in columns.items())
    between = "" if "output" in columns else ", with nothing between them"
    note = f"by their names, column {said}{between}; columns: {{{mapped}}} says so, or map others"
    return guessed, choose_record_format(guessed, record, file, key), note


def choose_record_format(source: DataSource, record: Record, file: str, key: str) -> RecordFormat:
    """Select the format of a source from its settings and its first record.

    Raises:
        UserError: settings that fit no format, or a record whose format is not recognized.
    """
    classes = _CLASSIFICATION if source.labels else _UNLABELLED
    formats = [f for f in RECORD_FORMATS if source.format in ("auto", f.name)] or [classes]
    roles = set().union(*(f.list_roles() for f in formats))
    for role in source.columns:
        if role not in roles:
            if role in _CLASSIFICATION.list_roles():
                raise UserError(
                    f"{key}.columns: {role} is a role of classification; set {key}.format: "
                    "classification, with labels and base.head: classifier"
                )
            near = difflib.get_close_matches(role, sorted(roles), n=1)
            hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(sorted(roles))}"
            raise UserError(
                f"{key}.columns: {role} is not a role of format {source.format}; {hint}"
            )
    formats = [f for f in formats if set(source.columns) <= f.list_roles()]
    if source.template is not None:
        formats = [f for f in formats if f.templated]
        if not formats:
            raise UserError(f"{key}.template is for completion and alpaca only; remove it")
        _check_template_fields(source, record, file, key)
    for candidate in formats:
        if not candidate.list_missing_columns(candidate.list_required_columns(source), record):
            return candidate
    if len(formats) == 1:
        _refuse_record_columns(formats[0], source, record, file, key)
    raise UserError(
        f"{key}: cannot tell the format of {file}: its columns are {', '.join(record)}; "
        + "; ".join(f.describe_columns() for f in formats or RECORD_FORMATS)
        + (
            f"; {_CLASSIFICATION.describe_columns()} (to be named)"
            if source.format == "auto"
            else ""
        )
        + f". {suggest_columns(record, key)}"
    )


def _refuse_record_columns(
    wanted: RecordFormat, source: DataSource, record: Record, file: str, key: str
) -> NoReturn:
    column = wanted.list_missing_columns(wanted.list_required_columns(source), record)[0]
    role = next((r for r, c in source.columns.items() if c == column), column)
    near = difflib.get_close_matches(column, [*record, *list_nested_columns(record)], n=1)
    raise UserError(
        f"{key}: {file} has no column {column}; its columns are {', '.join(record)}; "
        f"{wanted.describe_columns()}. "
        + (f"Did you mean {near[0]}? " if near else "")
        + f"Set {key}.columns: {{{role}: {near[0] if near else 'a_column'}}}"
        + suggest_column_names(file, source, key)
    )


def _check_template_fields(source: DataSource, record: Record, file: str, key: str) -> None:
    assert source.template is not None
    try:
        fields = list(string.Formatter().parse(source.template))
    except ValueError as error:
        raise UserError(f"{key}.template: {error}; write a literal brace as {{{{ or }}}}") from None
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if spec or conversion or not name:
            raise UserError(f"{key}.template: a field is {{column}}, without format or number")
        known = get_column_value(record, name) is not MISSING or name in (*source.columns, "input")
        if not known:
            raise UserError(
                f"{key}.template: {file} has no column {name}; its columns are {', '.join(record)}"
            )
