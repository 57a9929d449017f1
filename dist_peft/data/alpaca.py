"""The Alpaca prompt, with the system prompt and the earlier turns that LLaMA-Factory's files have.

::

    {system, or Alpaca's own preamble}

    ### Instruction:
    {history[0][0]}

    ### Response:{history[0][1]}{eos}

    ### Instruction:
    {instruction}

    ### Response:{output}{eos}

As in LLaMA-Factory, whose ``alpaca`` template this follows, a system prompt takes the place of
Alpaca's own first sentences, and the answers of earlier turns contribute to the loss.
"""

import json
from typing import Any

from dist_peft.core.errors import UserError
from dist_peft.data.record_fields import MISSING, RecordFields, parse_template_fields

__all__ = ["ALPACA_OPTIONAL", "Turn", "build_alpaca_turns"]

Turn = tuple[str, str]
"""Context text, text to train on."""

ALPACA_OPTIONAL = ("input", "system", "history")

# tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def build_alpaca_turns(fields: RecordFields) -> list[Turn]:
    """Return the turns of a record; the last one is that of ``instruction`` and ``output``.

    Raises:
        UserError: a column is not text, ``history`` is not a list of pairs, or ``source.template``
            writes the prompt without a system prompt or history that the record has.
    """
    output = fields.get_text("output")
    if fields.source.template is not None:
        _refuse_unwritten_columns(fields, fields.source.template)
        return [(fields.fill_template(fields.source.template), output)]
    instruction, context = fields.get_text("instruction"), fields.get_optional_text("input")
    system, history = fields.get_optional_text("system"), _read_earlier_turns(fields)
    before = system.strip() or (_WITH_INPUT if context else _WITHOUT_INPUT)
    turns: list[Turn] = []
    for question, answer in history:
        before += _format_question(question)
        if answer.strip():
            turns.append((before, answer))
            before = ""
        else:
            before += answer  # a blank answer is context only
    question = f"{instruction}\n\n### Input:\n{context}" if context else instruction
    turns.append((before + _format_question(question), output))
    return turns


def _format_question(question: str) -> str:
    return f"\n\n### Instruction:\n{question}\n\n### Response:"


def _read_earlier_turns(fields: RecordFields) -> list[Turn]:
    value: Any = fields.get_raw_value("history")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{fields.place}: history is not valid JSON: {error}") from None
    if value in (None, MISSING, "", []):
        return []
    column = fields.column_of_role("history")
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise UserError(
            f"{fields.place}: column {column} must be a list of [instruction, response] pairs; "
            f"write other forms as messages, or leave it out with ignore: [{column}]"
        )
    return [
        (
            fields.check_text_value(pair[0], f"{column}.{number}.0"),
            fields.check_text_value(pair[1], f"{column}.{number}.1"),
        )
        for number, pair in enumerate(value)
    ]


def _refuse_unwritten_columns(fields: RecordFields, template: str) -> None:
    named = parse_template_fields(template)
    for role in ("system", "history"):
        column = fields.column_of_role(role)
        if fields.get_raw_value(role) in (None, MISSING, "", []) or {role, column} & named:
            continue
        raise UserError(
            f"{fields.place}: column {column} would be missing from the prompt, which the source's "
            f"template writes without it; remove the template, add {{{column}}} to it, or leave "
            f"the column out with ignore: [{column}]"
        )
