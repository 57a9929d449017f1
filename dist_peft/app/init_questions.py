"""Questions of ``dist-peft init`` on a terminal, about options that the command line leaves out."""

import argparse
import shutil
from collections.abc import Callable

import torch

from dist_peft.core.errors import UserError

__all__ = ["ask_missing_options"]

_SCRIPTS = ("none", "slurm", "k8s")


def ask_missing_options(args: argparse.Namespace, read: Callable[[str], str] = input) -> None:
    """Fill ``args`` with answers; an empty answer takes the value in brackets.

    With both ``--base`` and ``--data`` given nothing is asked.

    Raises:
        UserError: the input ended.
    """
    if args.base and args.data:
        return
    try:
        args.base = args.base or _ask_until_given(read, "Base model (directory or hub id)")
        args.data = args.data or _ask_until_given(read, "Training records (file or hub data set)")
        if args.eval is None:
            args.eval = _ask(read, "Held-out records (file)", "5 % of the training records") or None
        if not (args.slurm or args.k8s):
            usual = "slurm" if shutil.which("sbatch") else "none"
            script = _ask_choice(read, "Job script", _SCRIPTS, usual)
            args.slurm, args.k8s = script == "slurm", script == "k8s"
        if args.gpus is None:
            usual = "of the partition" if args.slurm else str(max(1, torch.cuda.device_count()))
            args.gpus = _ask_number(read, "Cards of a host", usual)
        if args.gpu_memory is None and not torch.cuda.is_available():
            args.gpu_memory = _ask(read, "Memory of a card, such as 24GiB", "not known") or None
    except EOFError:
        raise UserError("the input ended before all questions were answered") from None


def _ask(read: Callable[[str], str], question: str, default: str) -> str:
    return read(f"{question} [{default}]: ").strip()


def _ask_until_given(read: Callable[[str], str], question: str) -> str:
    while not (answer := read(f"{question}: ").strip()):
        pass
    return answer


def _ask_choice(
    read: Callable[[str], str], question: str, choices: tuple[str, ...], default: str
) -> str:
    while True:
        answer = _ask(read, f"{question} ({', '.join(choices)})", default).lower() or default
        if answer in choices:
            return answer


def _ask_number(read: Callable[[str], str], question: str, default: str) -> int | None:
    while True:
        answer = _ask(read, question, default)
        if not answer:
            return int(default) if default.isdecimal() else None
        if answer.isascii() and answer.isdecimal() and int(answer) > 0:
            return int(answer)
