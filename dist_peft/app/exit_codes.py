"""Run a parsed command; turn its errors into exit codes.

0 done; 2 the user's configuration or input is wrong (one message, from one rank); 1 a failure (one
line, the traceback in ``log.rank-N.txt`` of the run directory); 3 a planned run does not fit its
cards; 4 files or steps of an exact run are not those recorded; 75 stopped on a signal at a safe
point, can be resumed; 128 + N ended at once by signal N.

The line that says why a command ended is the last on stderr, and also in ``log.txt`` of the run.
"""

import argparse
import contextlib
import logging
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from dist_peft.app.earlier_log import append_to_earlier_log, name_run_directory
from dist_peft.app.json_output import print_refusal
from dist_peft.app.last_line import claim_last_line, wait_for_exit
from dist_peft.app.out_of_memory import describe_out_of_memory
from dist_peft.app.stall_exit import allow_stall_exit
from dist_peft.core.errors import AuditError, RunFailure, UserError
from dist_peft.core.log import (
    FILE_ONLY,
    append_log_line,
    get_log_directory,
    set_verbosity,
    write_traceback,
)
from dist_peft.core.redaction import redact_text
from dist_peft.core.stop_signals import RESUMABLE, StopRequested, get_interrupt_exit_code
from dist_peft.core.world import RemoteError, RendezvousError, World, close_stall_watch
from dist_peft.export.verdict import VerificationError
from dist_peft.train.run_state import set_run_state

__all__ = ["run_command"]


def run_command(args: argparse.Namespace) -> int:
    """Call ``args.run(args, world)`` and return the exit code.

    Args:
        args: of ``app.cli.build_verb_parser``: ``verb``, ``run`` and the verb's own options.
    """
    with allow_stall_exit():
        try:
            return _run_until_exit(args)
        finally:
            close_stall_watch()


def _run_until_exit(args: argparse.Namespace) -> int:
    world = World()
    set_verbosity(getattr(args, "verbosity", "normal"))
    name_run_directory(None, world)
    try:
        world = replace(World.detect_world(), command=_describe_command(args))
        code: int = args.run(args, world)
        world.leave_process_group()
        return _exit_process(world, code)
    except UserError as error:
        if world.is_first or isinstance(error, RendezvousError):
            _report_end(str(error), 2)
        return _exit_process(world, 2)
    except RunFailure as error:
        if world.is_first:
            _report_end(str(error), 1)
        return _exit_process(world, 1)
    except AuditError as error:
        if world.is_first:
            _report_end(str(error), 4)
        return _exit_process(world, 4)
    except VerificationError as error:
        _report_end(str(error), 1)
        return _exit_process(world, 1)
    except RemoteError as error:
        _report_end(f"{_name_rank(world)}{error}", 1)
        return _exit_process(world, 1)
    except StopRequested as stop:
        if world.is_first or stop.is_alone:
            _report_end(f"{stop}; the same command resumes", RESUMABLE)
        return _exit_process(world, RESUMABLE)
    except KeyboardInterrupt:
        if world.is_first:
            _report_end("interrupted", get_interrupt_exit_code())
        return _exit_process(world, get_interrupt_exit_code())
    except Exception as error:
        _report_failure(error, world)
        return _exit_process(world, 1)


def _report_failure(error: Exception, world: World) -> None:
    """Write the traceback of an unexpected error, then one line that says what failed."""
    explanation = world.explain_failure(error)
    _claim_last_line_or_wait()
    run_dir = get_log_directory()
    file = None if run_dir is None else write_traceback(error, world.rank)
    first = next(iter(str(error).strip().splitlines()), "")
    cause = f"{type(error).__name__}: {first}" if first else type(error).__name__
    cause = describe_out_of_memory(error) or cause
    if explanation is None:
        if run_dir is None:
            write_traceback(error, world.rank)  # on stderr, where that of a lost peer is noise
        world.announce_failure(cause)
    line = explanation or f"{_name_rank(world)}failed: {cause}"
    if file is not None:
        line += f" (traceback: {file})"
    if run_dir is not None and (world.is_first or _names_first_rank(explanation)):
        set_run_state(run_dir, "failed", line)
        if not world.is_first:
            append_log_line(run_dir / "log.txt", line)
    _report_end(line, 1)


def _names_first_rank(explanation: str | None) -> bool:
    """Return whether rank 0, which writes log.txt, is among the ranks that gave no sign of life."""
    silent = (explanation or "").rpartition(" from ")[2]
    return re.search(r"\brank 0\b|\branks 0\b", silent) is not None


def _name_rank(world: World) -> str:
    return "" if world.size == 1 else f"rank {world.rank} on {world.host}: "


def _claim_last_line_or_wait() -> None:
    if not claim_last_line():
        wait_for_exit()


def _report_end(line: str, code: int) -> None:
    """Print the last line of a command that ends with ``code``, on stdout too with ``--json``, and
    write it to ``log.txt`` where there is one."""
    _claim_last_line_or_wait()
    line = redact_text(line)
    append_to_earlier_log(line)
    logger = logging.getLogger("dist_peft")
    if logger.handlers:  # else Python's last resort would print it a second time
        logger.error("%s", line, extra=FILE_ONLY)
    print_refusal(line, code)
    print(f"dist-peft: {line}", file=sys.stderr, flush=True)


def _describe_command(args: argparse.Namespace) -> str:
    """Return the verb and its options, in words that are the same on every rank.

    Without the configuration and its overrides, which are compared by key after the rendezvous (the
    file may have another path on each host), and without the options that a launcher adds.
    """
    own = ("verb", "run", "config", "overrides", "local_rank", "verbosity")
    given = {k: v for k, v in vars(args).items() if k not in own and v not in (None, False)}
    return " ".join([args.verb, *(f"--{k}={v}" for k, v in sorted(given.items()))])


def _exit_process(world: World, code: int) -> int:
    """Exit without waiting for peers that may be stuck in a collective with this rank.

    After success too: a thread of gloo that frees a tensor while the interpreter shuts down
    aborts the process.
    """
    if code == RESUMABLE:
        _create_stop_file()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if world.size > 1:
        os._exit(code)
    return code


def _create_stop_file() -> None:
    """Create the file ``DIST_PEFT_STOP_FILE``, if the script that started the ranks names one.

    Its launcher kills the ranks that have not ended yet and passes their exit code on instead.
    """
    name = os.environ.get("DIST_PEFT_STOP_FILE")
    if name:
        with contextlib.suppress(OSError):  # such as outside a container's mounts
            Path(name).touch()
