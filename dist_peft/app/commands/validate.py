"""``dist-peft validate``: render sequences with the loss mask or the label, without weights."""

import argparse
import logging
import os
import sys

from dist_peft.app.config_arguments import add_config_arguments
from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledSequences, load_labelled_sequences
from dist_peft.data.documents import SequenceSet, format_sequence, load_sequence_sets
from dist_peft.data.order import describe_epochs
from dist_peft.model.hub import (
    Tokenizer,
    load_tokenizer,
    resolve_base_directory,
    warn_of_trusted_code,
)

__all__ = ["add_arguments", "preview_labelled_rows", "preview_rows", "run"]

log = logging.getLogger("dist_peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft validate``."""
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, help="rows to print of each source")


def run(args: argparse.Namespace, world: World) -> int:
    """Print ``--rows`` rows of each source.

    Raises:
        UserError: the configuration, the tokenizer or the data are wrong.
    """
    if args.rows < 0:
        raise UserError(f"--rows {args.rows} is negative; give the number of rows to print")
    config = load_config(args.config, args.overrides)
    setup_log(None, world.rank, world.size)
    if not world.is_first:
        return 0
    warn_of_trusted_code(config.base)
    directory = resolve_base_directory(config.base, weights=False)
    tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
    preview = preview_labelled_rows if config.data.is_classification else preview_rows
    for name, sources in (("train", config.data.train), ("eval", config.data.eval)):
        lines = preview(config.data, sources, tokenizer, name, args.rows) if sources else []
        if lines and not _print_lines(lines):
            break
    return 0


def _print_lines(lines: list[str]) -> bool:
    """Print lines; return False if the reader has closed the pipe (``validate | head``)."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # or the interpreter's flush at exit fails, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def preview_rows(
    config: DataConfig, sources: list[DataSource], tokenizer: Tokenizer, name: str, count: int
) -> list[str]:
    """Return a line about each source and its first ``count`` rows, targets in ``[[...]]``.

    Raises:
        UserError: unreadable, empty or unfit data.
    """
    lines = []
    for number, rows in enumerate(load_sequence_sets(config, sources, tokenizer, name=name)):
        lines.append(
            f"data.{name}[{number}] {sources[number].path}: {rows.num_documents} documents in "
            f"{len(rows)} rows{describe_epochs(rows.epoch_ranges)}, {rows.total_tokens} tokens, of "
            f"which {rows.total_targets} contribute to the loss, marked [[...]]"
        )
        for index, where in _list_first_rows(rows, count):
            lines.append(f"--- row {index}{where}: {rows.num_tokens(index)} tokens")
            lines.append(format_sequence(rows, index, tokenizer))
    return lines


def preview_labelled_rows(
    config: DataConfig, sources: list[DataSource], tokenizer: Tokenizer, name: str, count: int
) -> list[str]:
    """Return a line about each source and the text and label of its first ``count`` rows.

    Raises:
        UserError: unreadable, empty or unfit data.
    """
    lines = []
    for number, rows in enumerate(load_labelled_sequences(config, sources, tokenizer, name=name)):
        task, domain = rows.task, sources[number].domain
        kind = "without labels"
        if task is not None:
            kind = f"of task {task.name}, labels {', '.join(task.labels)}"
        domain_text = "" if domain is None else f", domain {domain}"
        lines.append(
            f"data.{name}[{number}] {sources[number].path}: {len(rows)} rows"
            f"{describe_epochs(rows.epoch_ranges)} {kind}{domain_text}"
        )
        for index, where in _list_first_rows(rows, count):
            tokens, target, _ = rows.get_sequence(index)
            label = "none" if task is None else task.labels[int(target[0]) - task.start]
            lines.append(f"--- row {index}{where}: {len(tokens)} tokens, label {label}")
            lines.append(str(tokenizer.decode(tokens.tolist())))
    return lines


def _list_first_rows(rows: SequenceSet | LabelledSequences, count: int) -> list[tuple[int, str]]:
    """Return the first ``count`` rows: index, and the epoch if records have variants.

    The variants of a row follow it; packed ones need not hold the same records.
    """
    epochs = rows.epoch_ranges
    found = []
    for place in range(count):
        for epoch, ((first, stop),) in enumerate(epochs):
            if first + place < stop:
                where = "" if len(epochs) == 1 else f" (epoch {epoch})"
                found.append((first + place, where))
    return found
