"""``dist-peft chat``: try a run or a finished model, token by token."""

import argparse
import logging
import sys

from dist_peft.app.chat_model import ChatModel, open_model_directory, open_run
from dist_peft.app.chat_session import HELP_LINE, ChatSession, read_stdin_lines
from dist_peft.app.config_arguments import add_checkpoint_argument, parse_path
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.shared_lines import share_lines
from dist_peft.core.world import World
from dist_peft.model.generation import Sampling

__all__ = ["add_arguments", "run"]

log = logging.getLogger("dist_peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dist-peft chat``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=parse_path, dest="run_dir", help="run directory: its base and adapter"
    )
    source.add_argument(
        "--model",
        type=parse_path,
        dest="model_dir",
        help="directory that merge, or export in a format of transformers, wrote; or a GGUF file",
    )
    add_checkpoint_argument(parser, default="last")
    parser.add_argument(
        "--adapter",
        choices=("on", "off", "both"),
        default="on",
        help="of --run: on (default), off: the base's own answer, or both, one below the other",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="answer this and end; may be repeated. Without it the standard input is read: a "
        "conversation on a terminal, else a prompt a line",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--plain",
        action="store_true",
        help="continue the prompt as it is, without chat template; default with a --run that was "
        "trained on no conversations",
    )
    way.add_argument(
        "--template",
        action="store_true",
        help="use the chat template, whatever the --run was trained on",
    )
    parser.add_argument(
        "--max-new-tokens", type=_parse_count, default=256, metavar="N", help="default 256"
    )
    parser.add_argument(
        "--temperature", type=_parse_temperature, default=0.0, help="default 0: the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=_parse_share, default=1.0, help="share of the probability to draw from"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute all tokens again for each new one"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="a line of JSON an answer")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow the base's own code to run"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace, world: World) -> int:
    """Answer the prompts; return 0.

    Raises:
        UserError: on every rank: nothing that can be loaded, or a prompt that cannot be answered.
    """
    setup_log(None, world.rank, world.size)
    if args.model_dir is not None and args.checkpoint != "last":
        raise UserError("--checkpoint is of a --run; --model has none")
    session = ChatSession(
        _open_model(args, world),
        Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed, not args.no_cache),
        args.adapter,
        args.system,
        args.json,
        sys.stdout if world.is_first else None,
    )
    if args.prompt:
        session.answer_separately(args.prompt)
        return 0
    is_conversation = bool(world.any_rank(world.is_first and sys.stdin.isatty()))
    if is_conversation:
        log.info("%s", HELP_LINE)
    prompts = share_lines(world, lambda: read_stdin_lines("> "))
    if is_conversation:
        session.converse(prompts)
    else:
        session.answer_separately(prompts)
    return 0


def _open_model(args: argparse.Namespace, world: World) -> ChatModel:
    options = {
        "device": args.device,
        "plain": True if args.plain else False if args.template else None,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.run_dir is not None:
        model = open_run(args.run_dir, args.checkpoint, world, **options)
    else:
        model = open_model_directory(args.model_dir, world, **options)
    log.info("%s", model.choice)
    return model


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 8 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of tokens from 1")
    return int(text)


def _parse_temperature(text: str) -> float:
    value = _parse_float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no temperature from 0 to 100")
    return value


def _parse_share(text: str) -> float:
    value = _parse_float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and at most 1")
    return value


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None
