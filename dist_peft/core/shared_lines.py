"""Lines that the first rank reads, such as a person's, as every rank gets them.

A person may think for an hour, longer than a rank may wait in a collective. So the first rank reads
in a thread, and several times a second all ranks exchange whether there is a line yet::

    first rank   thread: readline ---> queue      loop: queue empty -> share {}
    others                                              queue: "Hi" -> share {"line": "Hi"}
                                                        at the end  -> share {"ended": true}
"""

import json
import queue
import threading
from collections.abc import Callable, Iterator

from dist_peft.core.progress_beat import enter_phase, mark_progress
from dist_peft.core.text_exchange import broadcast_text
from dist_peft.core.world import World

__all__ = ["share_lines"]

_SECONDS = 0.3
"""Between two exchanges while there is no line."""


def share_lines(world: World, read: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield on every rank the lines of the first rank's ``read()``. Collective.

    Args:
        read: called on the first rank; in a thread where there are several ranks, so that it must
            hold no collective.

    Raises:
        OSError: on every rank, as ``RemoteError`` on the others: reading fails.
    """
    if world.size == 1:
        yield from read()
        return
    lines: queue.Queue[str | Exception | None] = queue.Queue()
    if world.is_first:
        threading.Thread(target=_fill_queue, args=(read, lines), daemon=True).start()
    while True:
        found: str | Exception | None = ""
        waiting = False
        with world.raise_together("read a line"), enter_phase("wait for a line"):
            if world.is_first:
                try:
                    found = lines.get(timeout=_SECONDS)
                except queue.Empty:
                    waiting = True
                if isinstance(found, Exception):
                    raise found
        mark_progress()
        state = {"waiting": waiting, "line": found}
        state = json.loads(broadcast_text(json.dumps(state if world.is_first else {})))
        if state["waiting"]:
            continue
        if state["line"] is None:
            return
        yield state["line"]


def _fill_queue(
    read: Callable[[], Iterator[str]], lines: "queue.Queue[str | Exception | None]"
) -> None:
    try:
        for line in read():
            lines.put(line)
    except Exception as error:
        lines.put(error)
    lines.put(None)
