"""Hosts on one machine: network namespaces around a switch, each on a link of a given speed.

::

    namespace n0 [eth0]----[p0]            eth0 and its port are the two ends of a veth pair; each
    namespace n1 [eth0]----[p1] bridge     end lets out bytes at the link's rate (tc, token bucket),
    namespace n2 [eth0]----[p2]            so a link is full duplex and the switch never blocks

Needs root, ``ip`` and ``tc`` (iproute2). Nothing of the machine's own network is touched; names
hold the number of the process that made them, and what a killed one left behind is removed by the
next.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Self

__all__ = ["UNSHAPED", "Network"]

UNSHAPED = "unshaped"
_BURST_SECONDS = 1e-3
_LEAST_BURST = 128 * 1024  # bytes; above the largest packet (64 KiB with segmentation offload)
_QUEUE = "50ms"
_UNITS = {"mbit": 10**6, "gbit": 10**9}


class Network:
    """``count`` hosts; a context manager."""

    def __init__(self, count: int) -> None:
        prefix = f"dpw{os.getpid()}"
        self.names = [f"{prefix}n{i}" for i in range(count)]
        self.addresses = [f"10.79.0.{i + 1}" for i in range(count)]
        self._switch = f"{prefix}s"

    def __enter__(self) -> Self:
        _remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.names, self._switch]:
            _remove(name)

    def _build(self) -> None:
        for name in [*self.names, self._switch]:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            peer = ("type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", self._switch, "link", "add", f"p{i}", *peer)
            _run("ip", "-n", self._switch, "link", "set", f"p{i}", "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")

    def shape(self, rate: str) -> None:
        """Give every link ``rate`` (``10gbit``, ``500mbit``) both ways, or ``UNSHAPED``."""
        ends = [(name, "eth0") for name in self.names]
        ends += [(self._switch, f"p{i}") for i in range(len(self.names))]
        for name, device in ends:
            where = ("dev", device, "root")
            if rate == UNSHAPED:
                # there may be none yet
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "del", *where], capture_output=True, check=False
                )
                continue
            burst = max(_LEAST_BURST, int(bits_a_second(rate) / 8 * _BURST_SECONDS))
            bucket = ("tbf", "rate", rate, "burst", str(burst), "latency", _QUEUE)
            _run("tc", "-n", name, "qdisc", "replace", *where, *bucket)

    def command(self, host: int, *command: str) -> list[str]:
        """``command``, to be run on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]


def bits_a_second(rate: str) -> float:
    """``10gbit`` -> 1e10."""
    match = re.fullmatch(r"([\d.]+)(mbit|gbit)", rate)
    if match is None:
        raise SystemExit(f"link {rate!r} is not of the form 10gbit, 500mbit or {UNSHAPED}")
    return float(match[1]) * _UNITS[match[2]]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


def _remove(name: str) -> None:
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _remove_leftovers() -> None:
    """Namespaces of processes that are no more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for name in re.findall(r"^dpw\d+\w+", listed.stdout, re.M):
        if not Path("/proc", re.findall(r"\d+", name)[0]).exists():
            _remove(name)
