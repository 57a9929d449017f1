"""A small instruction task from the standard library: fill in a card about a function.

The prompt shows a function's first line, the completion is a card with three fields. The first two
can be copied from the prompt, the last (the first sentence of the docstring) has to be predicted::

    ### Function
    def copyfile(src, dst, *, follow_symlinks=True):
    ### Card
    kind: function
    arguments: src, dst, follow_symlinks
    summary: Copy data from src to dst in the most efficient way possible.

A base pretrained on the sources has never seen this format, so a short fine-tuning lowers the
held-out loss a lot. Evaluation records come from files that are held out of pretraining too, and
share neither prompt nor completion with a training record.
"""

import ast
import inspect
import json
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_peft.core.errors import UserError
from dist_peft.quickstart.corpus import SourceFile, read_stdlib_files

__all__ = ["has_right_fields", "write_stdlib_task"]

_MOST_TRAIN, _MOST_EVAL = 2400, 160
_LONGEST = 160  # characters of a signature and of a summary

Function = ast.FunctionDef | ast.AsyncFunctionDef
Record = dict[str, str]


def write_stdlib_task(out: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl`` into ``out`` and return their paths.

    Each line is ``{"prompt": ..., "completion": ...}``. The files depend on the installation and
    the seed only.

    Raises:
        UserError: no standard library to read, or ``out`` cannot be written.
    """
    with _explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    known, unseen = _split_task_records()
    shuffle = random.Random(seed).shuffle
    shuffle(known)
    shuffle(unseen)
    with _explain_write_errors(out):
        return (
            _write_records(out / "train.jsonl", known[:_MOST_TRAIN]),
            _write_records(out / "eval.jsonl", unseen[:_MOST_EVAL]),
        )


def has_right_fields(answer: str, completion: str) -> bool:
    """Return whether kind and arguments, which the prompt tells, are those of ``completion``."""
    return answer.strip().split("\n")[:2] == completion.strip().split("\n")[:2]


def _split_task_records() -> tuple[list[Record], list[Record]]:
    """Return training records, and records of held-out files that share no text with them."""
    train: dict[str, Record] = {}
    held_out: dict[str, Record] = {}
    for file in read_stdlib_files():
        for function, in_class in _iterate_functions(file):
            record = _make_card_record(function, in_class)
            if record is not None:
                (held_out if file.held_out else train)[record["prompt"]] = record
    completions = {record["completion"] for record in train.values()}
    unseen = [
        record
        for prompt, record in held_out.items()
        if prompt not in train and record["completion"] not in completions
    ]
    return list(train.values()), unseen


def _iterate_functions(file: SourceFile) -> Iterator[tuple[Function, bool]]:
    """Yield every function of a file, and whether it is defined directly in a class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in string literals
        try:
            tree = ast.parse(file.text)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, isinstance(node, ast.ClassDef)


def _make_card_record(function: Function, in_class: bool) -> Record | None:
    """Return prompt and completion; None without a short ASCII summary."""
    documentation = ast.get_docstring(function)
    if not documentation:
        return None
    summary = _extract_first_sentence(documentation)
    arguments = function.args
    optional = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *optional]:
        argument.annotation = None
    signature = f"def {function.name}({ast.unparse(arguments)}):"
    if not (summary.isascii() and 15 <= len(summary) <= _LONGEST >= len(signature)):
        return None
    kind = "method" if in_class and names[:1] in (["self"], ["cls"]) else "function"
    listed = ", ".join([*names, *(a.arg for a in optional)]) or "none"
    card = f"kind: {kind}\narguments: {listed}\nsummary: {summary}"
    return {"prompt": f"### Function\n{signature}\n### Card\n", "completion": card}


def _extract_first_sentence(documentation: str) -> str:
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(documentation))[0]
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))[0]


@contextmanager
def _explain_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the task into {out}: {error.strerror}") from None


def _write_records(path: Path, records: list[Record]) -> Path:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    return partial.replace(path)
