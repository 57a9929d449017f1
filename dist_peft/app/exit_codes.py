"""Run a parsed command; turn its errors into exit codes.

0 done; 2 the user's configuration or input is wrong (one message, from one rank); 1 a failure
(traceback); 75 stopped on a signal after a checkpoint, can be resumed.
"""

import argparse
import logging
import os
import sys
import traceback
from dataclasses import replace

from dist_peft.core.errors import UserError
from dist_peft.core.world import RemoteError, RendezvousError, World
from dist_peft.export.verdict import VerificationError

__all__ = ["run_command"]


def run_command(args: argparse.Namespace) -> int:
    """Call ``args.run(args, world)`` and return the exit code.

    Args:
        args: of ``app.cli.build_verb_parser``: ``verb``, ``run`` and the verb's own options.
    """
    world = World()
    try:
        world = replace(World.detect_world(), command=_describe_command(args))
        code: int = args.run(args, world)
        world.leave_process_group()
        return _exit_process(world, code)
    except UserError as error:
        if world.is_first or isinstance(error, RendezvousError):
            print(f"dist-peft: {error}", file=sys.stderr, flush=True)
        return _exit_process(world, 2)
    except VerificationError as error:
        print(f"dist-peft: {error}", file=sys.stderr, flush=True)
        return _exit_process(world, 1)
    except RemoteError as error:
        logging.getLogger("dist_peft").warning("%s", error)
        return _exit_process(world, 1)
    except KeyboardInterrupt:
        if world.is_first:
            print("dist-peft: interrupted", file=sys.stderr, flush=True)
        return _exit_process(world, 130)
    except Exception as error:
        traceback.print_exc()
        explanation = world.explain_failure(error)
        if explanation is not None:
            print(f"dist-peft: {explanation}", file=sys.stderr, flush=True)
        return _exit_process(world, 1)


def _describe_command(args: argparse.Namespace) -> str:
    """Return the verb and its options, in words that are the same on every rank.

    Without the configuration and its overrides, which are compared by key after the rendezvous (the
    file may have another path on each host), and without the options that a launcher adds.
    """
    own = ("verb", "run", "config", "overrides", "local_rank")
    given = {k: v for k, v in vars(args).items() if k not in own and v not in (None, False)}
    return " ".join([args.verb, *(f"--{k}={v}" for k, v in sorted(given.items()))])


def _exit_process(world: World, code: int) -> int:
    """Exit without waiting for peers that may be stuck in a collective with this rank.

    After success too: a thread of gloo that frees a tensor while the interpreter shuts down
    aborts the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if world.size > 1:
        os._exit(code)
    return code
