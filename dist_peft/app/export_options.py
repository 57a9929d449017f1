"""Arguments of ``merge`` and ``export``, and the formats that each of them affects."""

import argparse
import logging
from typing import Any, get_args

from dist_peft.app.config_arguments import add_checkpoint_argument, parse_path
from dist_peft.app.hub_upload import HubUpload, format_listing
from dist_peft.app.json_output import print_document
from dist_peft.app.verified_export import ExportOutcome, VerificationOptions
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.export.formats.export_format import ExportOption
from dist_peft.export.formats.registry import (
    FORMATS,
    describe_verification,
    list_format_facts,
    render_format_table,
)
from dist_peft.export.verification_choice import CONSUMER_SHARE, AskedVerification

__all__ = [
    "add_export_arguments",
    "add_merge_arguments",
    "add_output_arguments",
    "add_run_arguments",
    "add_verification_arguments",
    "collect_format_options",
    "parse_verification_options",
    "print_outcome",
    "require_one_process",
    "warn_unused_arguments",
]

log = logging.getLogger("dist_peft")

DTYPES = ("bfloat16", "float16", "float32")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``merge`` only."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="type of the merged weights; default bfloat16",
    )
    parser.add_argument(
        "--keep-zeros",
        action="store_true",
        help="weights of the blocks that are exactly 0 in the base stay 0: a pruned base stays "
        "sparse, without the adapter's change of these weights",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, the output and the comparison with the trained model, of both verbs."""
    parser.add_argument(
        "--run", type=parse_path, required=True, dest="run_dir", help="run directory"
    )
    add_output_arguments(parser)
    add_checkpoint_argument(parser, default=None)
    parser.add_argument(
        "--base",
        choices=["original", "decoded"],
        help="merge into the base's files (original, the default), or into the base as training "
        "saw it (decoded)",
    )
    add_verification_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the result and its comparison as a line of JSON"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the directory to write."""
    parser.add_argument("--out", type=parse_path, required=True, help="new directory")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model or adapter that is in --out"
    )


def add_verification_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison with the trained model."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compute with the result and compare logits"
    )
    parser.add_argument(
        "--verify",
        choices=get_args(AskedVerification),
        default="auto",
        dest="verify_method",
        help="who computes with the result: its own library, which loads it whole (consumer), or "
        "this program, which reads it block by block (blocks, of merged models); auto: the "
        f"library up to {CONSUMER_SHARE:.0%}% of the available memory",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run model code that comes with the base; the setting in the run directory is ignored",
    )
    parser.add_argument(
        "--max-error",
        type=_parse_error_share,
        metavar="X",
        help="largest error that ends with exit code 0, as a share of the change by training "
        "(0.3); default: 0.05 for forms that keep the trained function, 1 for the others",
    )
    parser.add_argument(
        "--verify-minutes",
        type=_parse_positive_minutes,
        default=10.0,
        metavar="N",
        help="longest time for loading the result with its own library; default 10",
    )


def _parse_error_share(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no share of at least 0")
    return number


def _parse_positive_minutes(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return number


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export`` only."""
    names = ", ".join(FORMATS)
    parser.add_argument(
        "--list",
        action=_ListFormatsAction,
        help="print content and consumer of each format, and the library that compares it here; "
        "--list --json: as JSON",
    )
    parser.add_argument(
        "--format", required=True, choices=FORMATS, metavar="NAME", help=f"one of {names}"
    )
    for option, formats in _list_options().items():
        text = f"{', '.join(formats)}: {option.help}"
        parser.add_argument(f"--{option.name}", help=text, **option.settings)


def _list_options() -> dict[ExportOption, list[str]]:
    """Map the options of all formats to the formats that each of them changes."""
    found: dict[ExportOption, list[str]] = {}
    for known in FORMATS.values():
        for option in known.options:
            found.setdefault(option, []).append(known.name)
    return found


def collect_format_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``args.format`` that are set, by ``ExportOption.key``."""
    keys = [option.key for option in FORMATS[args.format].options]
    return {key: getattr(args, key) for key in keys if getattr(args, key)}


class _ListFormatsAction(argparse.Action):
    """``--list``: print the table of formats and exit, as ``--help`` does."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=argparse.REMAINDER, metavar="", **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        if namespace.json or "--json" in values:
            print_document(list_format_facts(), indent=1)
        else:
            compared = {name: describe_verification(known) for name, known in FORMATS.items()}
            print(render_format_table({"compared with the trained model by": compared}))
        parser.exit()


def parse_verification_options(args: argparse.Namespace) -> VerificationOptions | None:
    """Return the options of the comparison with the trained model; None with ``--no-verify``."""
    if args.no_verify:
        for option in ("max-error",) * (args.max_error is not None) + ("verify",) * (
            args.verify_method != "auto"
        ):
            log.warning("--%s has no effect with --no-verify", option)
        return None
    return VerificationOptions(args.max_error, 60 * args.verify_minutes, args.verify_method)


def require_one_process(world: World) -> None:
    """Refuse several ranks: merge and export stream through one process.

    Raises:
        UserError: the launcher started more than one.
    """
    if world.size > 1:
        raise UserError(f"this verb runs in one process, not {world.size}; start it with python")


def warn_unused_arguments(args: argparse.Namespace) -> None:
    """Log a warning for each option without effect on the format."""
    known, options = FORMATS[args.format], collect_format_options(args)
    for option, formats in _list_options().items():
        if getattr(args, option.key) and known.name not in formats:
            log.warning("--%s has no effect on format %s", option.name, known.name)
    for sentence in known.find_idle_options(options):
        log.warning("%s", sentence)
    if args.base and known.get_content(options) != "merged":
        log.warning("--base has no effect where nothing is merged")


def print_outcome(outcome: ExportOutcome, upload: HubUpload | None, *, as_json: bool) -> None:
    """Upload a result where that was asked for, and print the result as JSON, or a dry run's list.

    Raises:
        UserError: it was not compared with the trained model, and is not uploaded.
        RunFailure: the hub did not take it.
    """
    sent = None if upload is None else upload.finish(outcome)
    if as_json:
        print_document(outcome.to_json() | ({} if sent is None else {"upload": sent}))
    elif sent is not None and sent["dry_run"]:
        print("\n".join(format_listing(sent)))
