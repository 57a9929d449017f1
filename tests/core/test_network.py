import socket
import time

import pytest

from dist_peft.core import network
from dist_peft.core.network import (
    AddressProbeServer,
    explain_absent_interface,
    find_interface,
    find_local_address_towards,
    is_loopback,
    listen_at_address,
    wait_for_port,
)
from tests.support.dist import free_port


def test_route_and_interface() -> None:
    address = find_local_address_towards("localhost", 9)
    assert is_loopback(address)
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("203.0.113.1") is None
    assert not is_loopback("203.0.113.1") and is_loopback("::1")
    with pytest.raises(OSError, match=r"[Nn]ame|known|resolution"):
        find_local_address_towards("no-such-host.invalid", 9)


@pytest.mark.parametrize(
    ("value", "absent"),
    [("", ""), ("lo", ""), ("lo,", ""), ("eth99", "eth99"), ("lo,eth99,x", "eth99"), ("LO", "LO")],
)
def test_absent_interface_is_explained(
    value: str, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMES", value)
    text = explain_absent_interface("NAMES")
    if not absent:
        assert text == ""
        return
    assert text.startswith(f"NAMES names the interface {absent!r}, and this host has no such ")
    assert "set it to one of " in text and " lo" in text and text.endswith(", or unset it")


def test_wait_for_port_says_why() -> None:
    port = free_port()
    assert wait_for_port("127.0.0.1", port, 0.3) == "nothing listens there (connection refused)"
    reason = wait_for_port("no-such-host.invalid", port, 0.1)
    assert reason is not None and "refused" not in reason
    with socket.create_server(("127.0.0.1", port)):
        assert wait_for_port("127.0.0.1", port, 5) is None


def test_wait_for_port_is_bounded() -> None:
    start = time.monotonic()
    assert wait_for_port("127.0.0.1", free_port(), 0.5) is not None
    assert 0.4 < time.monotonic() - start < 20


def test_only_the_greeter_is_recognized() -> None:
    greeter = AddressProbeServer()
    try:
        assert greeter.list_addresses()[-1] == "127.0.0.1"
        assert AddressProbeServer.is_reachable("127.0.0.1", greeter.port, greeter.word)
        assert not AddressProbeServer.is_reachable("127.0.0.1", greeter.port, bytes(16))
    finally:
        greeter.close()
    assert not AddressProbeServer.is_reachable("127.0.0.1", greeter.port, greeter.word)
    socket.create_server(("127.0.0.1", greeter.port)).close()  # the port is free again


def listen(address: str, **options: bool) -> str:
    listening, own = listen_at_address(address, 0, **options)
    with listening:
        host, port = listening.getsockname()[:2]
        assert wait_for_port(own, port, 2) is None
        return str(host)


def test_listens_on_the_interface_that_the_address_means(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listen("127.0.0.1", is_one_host=False) == "127.0.0.1"
    assert is_loopback(listen("localhost", is_one_host=False))
    everywhere = ("::", "0.0.0.0")
    assert listen("192.0.2.1", is_one_host=False) in everywhere  # no address of this host
    assert listen("no-such-host.invalid", is_one_host=False) in everywhere

    with monkeypatch.context() as patch:
        patch.setattr(network, "_list_ip_addresses", lambda *_: [(socket.AF_INET, "127.0.1.1")])
        assert listen("node1", is_one_host=True) == "127.0.1.1"
        assert listen("node1", is_one_host=False) in everywhere  # others see another address


def test_taken_port_is_an_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(OSError, match="in use"),
    ):
        listen_at_address("127.0.0.1", other.getsockname()[1], is_one_host=True)
