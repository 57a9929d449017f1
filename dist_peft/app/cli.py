"""The command line: verbs as thin commands, errors as exit codes.

Exit codes: 0 done; 2 the user's configuration or input is wrong (one message, from one rank);
1 a failure (traceback); 75 stopped on a signal after a checkpoint, can be resumed.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_peft.app import export_options
from dist_peft.app.commands import combine as combine_app
from dist_peft.app.commands import eval as eval_app
from dist_peft.app.commands import export as export_app
from dist_peft.app.commands import inspect as inspect_app
from dist_peft.app.commands import quantize as quantize_app
from dist_peft.app.commands import quickstart as quickstart_app
from dist_peft.app.commands import train as train_app
from dist_peft.app.commands import validate as validate_app
from dist_peft.core.errors import UserError
from dist_peft.core.world import MeetingError, RemoteError, World
from dist_peft.export.verdict import VerificationError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    args = _parser().parse_args(argv)
    world = World()
    try:
        world = replace(World.from_env(), command=_command_of(args))
        code: int = args.run(args, world)
        world.disconnect()
        return _leave(world, code)
    except UserError as error:
        if world.is_first or isinstance(error, MeetingError):
            print(f"dist-peft: {error}", file=sys.stderr, flush=True)
        return _leave(world, 2)
    except VerificationError as error:
        print(f"dist-peft: {error}", file=sys.stderr, flush=True)
        return _leave(world, 1)
    except RemoteError as error:
        logging.getLogger("dist_peft").warning("%s", error)
        return _leave(world, 1)
    except KeyboardInterrupt:
        if world.is_first:
            print("dist-peft: interrupted", file=sys.stderr, flush=True)
        return _leave(world, 130)
    except Exception as error:
        traceback.print_exc()
        explanation = world.explain(error)
        if explanation is not None:
            print(f"dist-peft: {explanation}", file=sys.stderr, flush=True)
        return _leave(world, 1)


def _command_of(args: argparse.Namespace) -> str:
    """The verb and its options, in words that are the same on every rank.

    Without the configuration and its overrides, which are compared by key once ranks have met (the
    file may lie elsewhere on each host), and without what a launcher adds for each rank.
    """
    own = ("verb", "run", "config", "overrides", "local_rank")
    given = {k: v for k, v in vars(args).items() if k not in own and v not in (None, False)}
    return " ".join([args.verb, *(f"--{k}={v}" for k, v in sorted(given.items()))])


def _leave(world: World, code: int) -> int:
    """Leave without waiting for peers that may be stuck in a collective with this rank.

    After success too: a thread of gloo that frees a tensor while the interpreter shuts down
    aborts the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if world.size > 1:
        os._exit(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-peft",
        description="Fine-tune adapters on a frozen, quantized, sharded base model.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="run a configuration")
    _add_config(train)
    train.set_defaults(run=train_app.run)

    validate = verbs.add_parser("validate", help="show rows with the loss mask, without weights")
    _add_config(validate)
    validate_app.add_arguments(validate)
    validate.set_defaults(run=validate_app.run)

    evaluate = verbs.add_parser("eval", help="held-out loss of a base, or of a run's adapter")
    _add_config(evaluate)
    evaluate.add_argument("--run", type=Path, dest="run_dir", help="use this run's newest state")
    evaluate.add_argument(
        "--choices",
        type=Path,
        action="append",
        metavar="FILE",
        help="also answer the multiple-choice questions of a JSON Lines file; may be repeated",
    )
    evaluate.set_defaults(run=eval_app.run)

    quantize = verbs.add_parser("quantize", help="write the base packed, as base.quant says")
    _add_config(quantize)
    quantize.add_argument("--out", type=Path, required=True, help="new directory")
    quantize.set_defaults(run=quantize_app.run)

    merge = verbs.add_parser("merge", help="write base + adapter as a Hugging Face directory")
    _add_merge(merge)
    export_options.add_merge_arguments(merge)
    merge.set_defaults(run=export_app.run_merge)

    export = verbs.add_parser("export", help="write a run in a public format")
    export_options.add_export_arguments(export)
    _add_merge(export)
    export.set_defaults(run=export_app.run_export)

    combine = verbs.add_parser("combine", help="several LoRA adapters of one base become one")
    combine_app.add_arguments(combine)
    combine.set_defaults(run=combine_app.run)

    inspect = verbs.add_parser("inspect", help="what is this base, adapter, run or checkpoint")
    inspect.add_argument("path", type=Path)
    inspect.set_defaults(run=inspect_app.run)

    quickstart = verbs.add_parser("quickstart", help="the main job on a base made on the spot")
    quickstart_app.add_arguments(quickstart)
    quickstart.set_defaults(run=quickstart_app.run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="YAML file")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # added by the deepspeed launcher; the environment says the same
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a key")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, dest="run_dir", help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument(
        "--base",
        choices=["original", "decoded"],
        help="merge into the base's files (original, the default), or into the base as training "
        "saw it (decoded)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not reload the result and compare logits"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run model code that comes with the base; what the run directory says about it does "
        "not count",
    )
    export_options.add_verify_arguments(parser)
