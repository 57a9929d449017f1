"""Addresses of this host: which one leads to a peer, and under which name it is known.

A compute node has several interfaces (management, fabric, container bridges); the first that the
system lists is often the wrong one. The kernel's routing table knows which one leads to a peer.
"""

import errno
import ipaddress
import os
import secrets
import socket
import threading
import time

import psutil

from dist_peft.core.stop_signals import StopRequested, is_stop_requested

__all__ = [
    "AddressProbeServer",
    "explain_absent_interface",
    "find_interface",
    "find_local_address_towards",
    "is_loopback",
    "listen_at_address",
    "wait_for_port",
]


def find_local_address_towards(address: str, port: int) -> str:
    """Return the address of this host from which packets to ``address`` leave.

    A connected UDP socket asks the kernel for the route; nothing is sent.

    Raises:
        OSError: the name does not resolve, or no route leads there.
    """
    family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def find_interface(address: str) -> str | None:
    """Return the network interface that carries a local ``address``."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return None


def explain_absent_interface(variable: str) -> str:
    """Return why the interfaces that an environment variable names cannot be used here.

    Args:
        variable: holds names separated by commas, as gloo reads them.

    Returns:
        A message; empty where they can be used, or the variable is unset or empty.
    """
    found = {
        name
        for name, entries in psutil.net_if_addrs().items()
        if any(entry.family in (socket.AF_INET, socket.AF_INET6) for entry in entries)
    }
    absent = [name for name in os.environ.get(variable, "").split(",") if name not in {*found, ""}]
    if not absent:
        return ""
    return (
        f"{variable} names the interface {absent[0]!r}, and this host has no such interface with "
        f"an IP address; set it to one of {', '.join(sorted(found))}, or unset it"
    )


def wait_for_port(address: str, port: int, seconds: float) -> str | None:
    """Try to connect until a process listens; return the last error's text if none did.

    Raises:
        StopRequested: a signal has reached this process, and no process listens.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            left = max(0.1, end - time.monotonic())
            socket.create_connection((address, port), timeout=min(left, 10.0)).close()
            return None
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.ECONNREFUSED:
                reason = "nothing listens there (connection refused)"
        if time.monotonic() >= end:
            return reason
        if is_stop_requested():
            raise StopRequested(is_alone=True)
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))


def listen_at_address(address: str, port: int, *, is_one_host: bool) -> tuple[socket.socket, str]:
    """Listen on the interface that ``address`` leads to, and on no other.

    On all interfaces where the address does not say which: it is none of this host's (a virtual
    address of a service), or a name that leads to loopback here alone (as many hosts have their own
    in ``/etc/hosts``), and ranks come from other hosts.

    Args:
        address: under which ranks look for this host: a name or an IP address.
        is_one_host: whether all ranks run on this host.

    Returns:
        The listening socket, and a host under which this process reaches it.

    Raises:
        OSError: the port is taken or not permitted.
    """
    means_loopback = is_one_host or address == "localhost" or _is_loopback_literal(address)
    for family, ip in _list_ip_addresses(address, port):
        if is_loopback(ip) and not means_loopback:
            continue
        try:
            return socket.create_server((ip, port), family=family, backlog=4096), ip
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    if socket.has_dualstack_ipv6():
        everywhere = socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True
        )
        return everywhere, "localhost"
    return socket.create_server(("", port), backlog=4096), "localhost"


def _is_loopback_literal(address: str) -> bool:
    try:
        return is_loopback(address)
    except ValueError:  # a name
        return False


def _list_ip_addresses(address: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(family, str(target[0])) for family, _, _, _, target in found]


class AddressProbeServer:
    """Server of rank 0 while the ranks search for its address; sends a secret word to each client.

    Ranks on other hosts try every address of rank 0; only the word proves that it was rank 0 who
    answered (a bridge address such as 172.17.0.1 exists on every host).
    """

    def __init__(self) -> None:
        self.word = secrets.token_bytes(16)
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._answer_connections, daemon=True).start()

    def _answer_connections(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self.word)

    def list_addresses(self) -> list[str]:
        """Return this host's IPv4 addresses, loopback last."""
        found = [
            entry.address
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family == socket.AF_INET
        ]
        return sorted(found, key=is_loopback)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @staticmethod
    def is_reachable(address: str, port: int, word: bytes, seconds: float = 2.0) -> bool:
        """Return whether the server that answers there sends this word."""
        try:
            with socket.create_connection((address, port), timeout=seconds) as connection:
                return connection.recv(len(word), socket.MSG_WAITALL) == word
        except OSError:
            return False
