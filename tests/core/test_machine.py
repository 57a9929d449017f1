import os
import socket
import subprocess
import sys

import pytest

from dist_peft.core.machine import identify_machine


@pytest.mark.e2e
def test_processes_of_a_machine_agree() -> None:
    code = "from dist_peft.core.machine import identify_machine; print(identify_machine())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == identify_machine()
    assert identify_machine().startswith(socket.gethostname())
    if os.path.exists("/proc/self/ns/pid"):
        assert len(identify_machine().split()) >= 2
