"""The program that launchers start in place of ``python``; see ``forked_python.py``.

    python -IS forked_python_client.py SOCKET SCRIPT [ARGUMENT ...]

It imports only small modules of the standard library.
"""

import json
import os
import signal
import socket
import struct
import sys

FORWARDED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def main() -> None:
    """Have the script run, and end as it does."""
    address, *words = sys.argv[1:]
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = {
        "words": words,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "process": os.getpid(),
        "ignored": ignored,
    }
    data = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"x"], [0, 1, 2])
    server.sendall(struct.pack("!I", len(data)) + data)
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    answer = server.recv(4, socket.MSG_WAITALL)
    code = struct.unpack("!i", answer)[0] if len(answer) == 4 else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
