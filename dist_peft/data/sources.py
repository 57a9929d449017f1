"""Build examples from records: formats and their detection, columns and templates.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dist_peft.core.config.run import DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.alpaca import ALPACA_OPTIONAL, Turn, alpaca_turns
from dist_peft.data.blank_turns import BlankTurns, excluded_turn, is_blank_turn
from dist_peft.data.column_hints import columns_hint, nested_columns
from dist_peft.data.files import Opened, Place, Record, read_records
from dist_peft.data.left_out import BLANK, LeftOut, excluding_column
from dist_peft.data.meanings import UnusedColumns
from dist_peft.data.messages import normalized_message
from dist_peft.data.record_fields import MISSING, RecordFields, column_value, template_fields

__all__ = ["Chat", "Completion", "Example", "Labelled", "Text", "read_examples"]


@dataclass(frozen=True)
class Completion:
    """Train on ``completion`` as the continuation of ``prompt``.

    Attributes:
        earlier: turns before, (context, target text) each; ``prompt`` follows the last.
    """

    prompt: str
    completion: str
    earlier: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Chat:
    """Messages with at least ``role`` and, except pure tool calls, a string ``content``."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Text:
    """A document; every token contributes to the loss."""

    text: str


@dataclass(frozen=True)
class Labelled:
    """One or two texts with a class: ``label`` is an index into the labels of the source."""

    text: str
    text_pair: str | None
    label: int


Example = Completion | Chat | Text | Labelled


def read_examples(
    source: DataSource, opened: Opened, key: str, notes: list[str] | None = None
) -> Iterator[tuple[Place, Example]]:
    """Yield every example of the source, with its place.

    Args:
        opened: from ``files.open_source``.
        key: configuration key for messages, such as ``data.train[0]``.
        notes: one-time warnings for the user are appended at the end.

    Raises:
        UserError: no records; unknown format; a record that does not fit, named by file and number.
    """
    chosen: _Format | None = None
    unused: UnusedColumns | None = None
    kind: type[Example] | None = None
    left_out = LeftOut(source.path, key)
    blank_turns = BlankTurns()
    for place, record in read_records(opened, source.limit):
        if chosen is None:
            chosen = _choose(source, record, place.file, key)
            reads = {r for r in chosen.roles() if r not in source.columns} | {
                *chosen.aliases.values()
            }
            unused = UnusedColumns(source, reads, chosen.name, key)
        assert unused is not None
        left_out.records += 1
        if column := excluding_column(record, unused.taken):
            left_out.add(f"say not to train on them ({column}: {record[column]})", place)
            continue
        unused.check(record, str(place))
        if lacking := chosen.lacks(source, record):
            raise UserError(
                f"{place} has no column {lacking[0]} (has {', '.join(record)}), but the first "
                f"record of the source is of format {chosen.name}; fix the record, or give records "
                "of another form a source of their own"
            )
        example = chosen.build(RecordFields(source, record, place))
        kind = kind or type(example)
        if not isinstance(example, kind):
            raise UserError(
                f"{place} holds {'messages' if isinstance(example, Chat) else 'text'} where "
                "earlier records do not; give each kind a file of its own"
            )
        if isinstance(example, Chat):
            example = Chat(blank_turns.excluded(example.messages, place), example.tools)
        if _is_blank(example):
            left_out.add(BLANK, place)
            continue
        yield place, example
    left_out.refuse_if_all()
    if unused is not None and notes is not None:
        notes += [*left_out.notes, *blank_turns.notes, *unused.notes]


def _is_blank(example: Example) -> bool:
    """Return whether the target text of ``example`` is empty or white space."""
    if isinstance(example, Completion):
        return not example.completion.strip()
    if isinstance(example, Chat):
        turns = [m for m in example.messages if m["role"] == "assistant"]
        remaining = [m for m in turns if m.get("train") is not False]
        return not remaining and any(is_blank_turn(m) for m in turns)
    return isinstance(example, Text) and not example.text.strip()


# -- one record ----------------------------------------------------------------------------------


def _completion(fields: RecordFields) -> Example:
    template = fields.source.template
    prompt_value, answer = fields.raw("prompt"), fields.raw("completion")
    if template is None and isinstance(prompt_value, list) and isinstance(answer, list | dict):
        answer = answer if isinstance(answer, list) else [answer]
        where = f"{fields.place}, message"
        before = [
            normalized_message(m, f"{where} {i} of prompt") for i, m in enumerate(prompt_value, 1)
        ]
        after = [
            normalized_message(m, f"{where} {i} of completion") for i, m in enumerate(answer, 1)
        ]
        # only the completion contributes to the loss
        before = [excluded_turn(m) if m["role"] == "assistant" else m for m in before]
        return Chat(_with_system(before + after, fields), _tools(fields))
    if (fields.raw("tools") or "[]") not in (MISSING, "[]"):
        raise UserError(
            f"{fields.place}: column tools is for conversations, and prompt is text; write the "
            f"record as messages, or leave the column out with ignore: [{fields.column('tools')}]"
        )
    named = template_fields(template)
    if fields.optional("system") and not {"system", fields.column("system")} & named:
        raise UserError(
            f"{fields.place}: column {fields.column('system')} would be missing from the prompt; "
            f"write it with the source's template, such as "
            f'"{{{fields.column("system")}}}\\n{{...}}", or leave the column out with ignore: '
            f"[{fields.column('system')}]"
        )
    prompt = fields.filled(template) if template is not None else fields.text("prompt")
    return Completion(prompt, fields.text("completion"))


def _alpaca(fields: RecordFields) -> Completion:
    *earlier, (prompt, output) = alpaca_turns(fields)
    return Completion(prompt, output, tuple(earlier))


def _text(fields: RecordFields) -> Text:
    return Text(fields.text("text"))


def _labelled(fields: RecordFields) -> Labelled:
    columns, labels = fields.source.columns, fields.source.labels
    value = fields.raw("label")
    # JSON has numbers and booleans where tables have text
    plain = value is MISSING or isinstance(value, str)
    label = fields.text("label") if plain else json.dumps(value, default=str)
    if label not in labels:
        raise UserError(
            f"{fields.place}: column {columns.get('label', 'label')} is {label!r}, which is none "
            f"of the labels {', '.join(labels)}; add it to the source's labels, or fix the record"
        )
    paired = "text_pair" in columns or fields.raw("text_pair") is not MISSING
    pair = fields.text("text_pair") if paired else None
    return Labelled(fields.text("text"), pair, labels.index(label))


def _chat(fields: RecordFields) -> Chat:
    messages = fields.raw("messages")
    if messages is MISSING and "messages" not in fields.source.columns:
        messages = fields.raw("conversations")
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
        normalized_message(message, f"{where} {i}") for i, message in enumerate(messages, start=1)
    ]
    return Chat(_with_system(normal, fields), _tools(fields))


def _with_system(messages: list[dict[str, Any]], fields: RecordFields) -> list[dict[str, Any]]:
    """Return ``messages`` with the text of column ``system`` in front, if there is one.

    Raises:
        UserError: they begin with another system message.
    """
    system = fields.optional("system")
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise UserError(
            f"{fields.place}: column system and the system message differ; remove one of them"
        )
    return messages


def _tools(fields: RecordFields) -> list[dict[str, Any]] | None:
    """Return the tool descriptions: a list of JSON schemas, or parsed from its JSON text."""
    tools = fields.raw("tools")
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
class _Format:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[RecordFields], Example]
    # the role whose text source.template replaces, if the format accepts a template
    templated: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def roles(self) -> set[str]:
        return {*self.required, *self.optional}

    def needs(self, source: DataSource) -> list[str]:
        """Return the roles that must be in every record."""
        return [r for r in self.required if source.template is None or r != self.templated]

    def lacks(self, source: DataSource, record: Record) -> list[str]:
        """Return the required columns that ``record`` does not have."""
        wanted = [source.columns.get(role, role) for role in self.needs(source)]
        return [
            column
            for column in wanted
            if column_value(record, column) is MISSING and self.aliases.get(column) not in record
        ]

    def describe(self) -> str:
        names = [f"{r} or {self.aliases[r]}" if r in self.aliases else r for r in self.required]
        return f"{self.name} needs {', '.join(names + [f'{o}?' for o in self.optional])}"


_FORMATS = (
    _Format(
        "chat", ("messages",), ("tools", "system"), _chat, aliases={"messages": "conversations"}
    ),
    _Format(
        "completion",
        ("prompt", "completion"),
        ("tools", "system"),
        _completion,
        templated="prompt",
    ),
    _Format("alpaca", ("instruction", "output"), ALPACA_OPTIONAL, _alpaca, templated="instruction"),
    _Format("text", ("text",), (), _text),
)
_CLASSIFICATION = _Format("classification", ("text", "label"), ("text_pair",), _labelled)


def _choose(source: DataSource, record: Record, file: str, key: str) -> _Format:
    """Select the format of a source from its settings and its first record.

    Raises:
        UserError: settings that fit no format, or a record whose format is not recognized.
    """
    formats = [f for f in _FORMATS if source.format in ("auto", f.name)] or [_CLASSIFICATION]
    roles = set().union(*(f.roles() for f in formats))
    for role in source.columns:
        if role not in roles:
            if role in _CLASSIFICATION.roles():
                raise UserError(
                    f"{key}.columns: {role} is a role of classification; set {key}.format: "
                    "classification, with labels and base.head: classifier"
                )
            near = difflib.get_close_matches(role, sorted(roles), n=1)
            hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(sorted(roles))}"
            raise UserError(
                f"{key}.columns: {role} is not a role of format {source.format}; {hint}"
            )
    formats = [f for f in formats if set(source.columns) <= f.roles()]
    if source.template is not None:
        formats = [f for f in formats if f.templated]
        if not formats:
            raise UserError(f"{key}.template is for completion and alpaca only; remove it")
        _check_template(source, record, file, key)
    for candidate in formats:
        if not candidate.lacks(source, record):
            return candidate
    if len(formats) == 1:
        _refuse_columns(formats[0], source, record, file, key)
    raise UserError(
        f"{key}: cannot tell the format of {file}: its columns are {', '.join(record)}; "
        + "; ".join(f.describe() for f in formats or _FORMATS)
        + (f"; {_CLASSIFICATION.describe()} (to be named)" if source.format == "auto" else "")
        + f". {columns_hint(record, key)}"
    )


def _refuse_columns(
    wanted: _Format, source: DataSource, record: Record, file: str, key: str
) -> NoReturn:
    column = wanted.lacks(source, record)[0]
    role = next((r for r, c in source.columns.items() if c == column), column)
    near = difflib.get_close_matches(column, [*record, *nested_columns(record)], n=1)
    raise UserError(
        f"{key}: {file} has no column {column}; its columns are {', '.join(record)}; "
        f"{wanted.describe()}. "
        + (f"Did you mean {near[0]}? " if near else "")
        + f"Set {key}.columns: {{{role}: {near[0] if near else 'a_column'}}}"
    )


def _check_template(source: DataSource, record: Record, file: str, key: str) -> None:
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
        known = column_value(record, name) is not MISSING or name in (*source.columns, "input")
        if not known:
            raise UserError(
                f"{key}.template: {file} has no column {name}; its columns are {', '.join(record)}"
            )
