import os
import resource
import socket
import subprocess
import sys

import pytest

from dist_peft.core.machine import identify_machine, raise_open_file_limit


@pytest.mark.e2e
def test_processes_of_a_machine_agree() -> None:
    code = "from dist_peft.core.machine import identify_machine; print(identify_machine())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == identify_machine()
    assert identify_machine().startswith(socket.gethostname())
    if os.path.exists("/proc/self/ns/pid"):
        assert len(identify_machine().split()) >= 2


def test_open_files_up_to_the_hard_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_open_file_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
