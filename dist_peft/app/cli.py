"""The command line: ``dist-peft VERB``.

A verb is a module of ``app.commands`` with ``add_arguments(parser)`` and ``run(args, world)``. It
is imported when it is named, so that ``--help`` and ``--version`` return at once: torch and
transformers take seconds to import.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from dist_peft.app.help_texts import format_examples
from dist_peft.app.json_output import print_refusal, reserve_stdout
from dist_peft.app.option_parser import OptionParser, add_verbosity_arguments
from dist_peft.core.stop_signals import (
    catch_stop_signals,
    get_interrupt_exit_code,
    interrupt_on_stop_signals,
)

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "run a configuration",
    "init": "write a commented configuration and a job script for this cluster",
    "validate": "check a configuration and its data, and show sequences, without weights",
    "plan": "memory, traffic and time of a run, before it starts",
    "eval": "held-out loss of a base, or of a run's adapter",
    "chat": "generate text with a run or a finished model",
    "quantize": "write the base packed, according to base.quant",
    "prune": "write the base with part of its weights zero, or without some blocks",
    "merge": "write base + adapter as a Hugging Face directory",
    "export": "write a run in a public format",
    "switch": "give a merged model the adapter of another run",
    "combine": "combine several LoRA adapters of one base into one",
    "compare": "curves of several runs over each other, and tables of their differences",
    "report": "draw the report of a finished run again",
    "replay": "compute steps of an exact run again and compare them with its record",
    "inspect": "describe a base, adapter, run or checkpoint",
    "schema": "print the JSON schema of configurations, for editors",
    "convert-config": "turn a configuration of axolotl or LLaMA-Factory into one of dist-peft",
    "completion": "print a completion script for a shell",
    "quickstart": "run the main job on a small base pretrained for it",
}
"""Verb, also the name of its module in ``app.commands`` (with ``_`` for ``-``), and its line in
``--help``."""

RESUMABLE_VERBS = {"train", "eval", "quantize", "prune", "replay"}
"""Verbs that stop on a signal at a safe point; the others end at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code (``app.exit_codes``)."""
    argv = sys.argv[1:] if argv is None else argv
    with catch_stop_signals(), reserve_stdout(argv):
        try:
            if not argv or argv[0] not in RESUMABLE_VERBS:
                interrupt_on_stop_signals()
            args = build_verb_parser(argv).parse_args(argv)
            from dist_peft.app.exit_codes import run_command  # after --help and errors of usage
        except KeyboardInterrupt:
            print("dist-peft: interrupted", file=sys.stderr)
            print_refusal("interrupted", get_interrupt_exit_code())
            return get_interrupt_exit_code()
        return run_command(args)


def build_verb_parser(argv: Sequence[str] | None) -> argparse.ArgumentParser:
    """Return the parser of ``argv``: all verbs, with arguments only of the verb in ``argv``.

    Args:
        argv: None: with the arguments of every verb, for completion scripts.
    """
    parser = OptionParser(
        prog="dist-peft",
        description="Fine-tune adapters on a frozen, quantized, sharded base model.",
    )
    version = importlib.metadata.version("dist_peft")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in COMMANDS.items():
        command = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=format_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if argv is None or (argv and argv[0] == name):
            module = importlib.import_module(f"dist_peft.app.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            add_verbosity_arguments(command)
            command.set_defaults(run=module.run)
    return parser
