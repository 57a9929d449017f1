"""Freed blocks leave the process, or stay for the next of their size; limits of memory."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_peft.core.host_memory import read_available_memory

SCRIPT = """
import psutil, resource, torch
from dist_peft.core.host_memory import return_freed_memory
from contextlib import nullcontext
import sys
torch.ones(6 * 2**20, dtype=torch.uint8).clone()  # raises glibc's threshold, as a first tensor does
rss = lambda: psutil.Process().memory_info().rss
with return_freed_memory() if sys.argv[1] == "on" else nullcontext():
    before, kept = rss(), []
    for _ in range(100):
        rows = torch.ones(2**21, dtype=torch.uint8)
        kept.append(torch.ones(2**18, dtype=torch.uint8))
        more = torch.ones(2**21, dtype=torch.uint8)
        kept.append(more[: 2**18].clone())
        del rows, more
    print((rss() - before) / 2**20)
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for round in range(60):
        if round == 10:
            before = faults()
        small = [torch.ones(2**20, dtype=torch.uint8) for _ in range(7)]
        del small
    print(faults() - before)
"""


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_only_what_is_kept_rests() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "on"], capture_output=True, text=True, check=True
    )
    grown, faults = map(float, done.stdout.split())
    assert 50 <= grown + 2 <= 62, f"{grown:.1f} MiB rest for 50 MiB that are kept"
    assert faults < 2 * 7 * 256, f"{faults:.0f} faults: temporaries are mapped again each time"


KEEPING = """
import psutil, resource, torch
from dist_peft.core.host_memory import keep_freed_memory, trim_heap
rss = lambda: psutil.Process().memory_info().rss // 2**20
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**20)
with keep_freed_memory():
    for round in range(21):
        if round == 5:
            before = faults()
        rows = torch.ones(2**21)
        more = rows + 1
        del rows, more
    print(faults() - before)
    pairs = [(torch.ones(2**20), torch.ones(64)) for _ in range(10)]
    kept = [small for _, small in pairs]
    whole = rss()
    del pairs
    for above in (100 * 2**20, 20 * 2**20):
        trim_heap(above)
        print(whole - rss())
"""


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_of_chunks_is_used_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True
    )
    mapped_again = 16 * 2 * 2048
    faults, freed, trimmed = map(int, done.stdout.split())
    assert faults < mapped_again / 4
    assert freed < 4 and trimmed >= 36, "holes between small blocks stay until the heap is trimmed"


GROUPS = {
    # a batch system limits the job, a step of it is not limited
    "0::/job/step": {
        "sys/fs/cgroup/job/memory.max": "3000000",
        "sys/fs/cgroup/job/memory.current": "2500000",
        "sys/fs/cgroup/job/memory.stat": "anon 500000\ninactive_file 700000\nactive_file 300000\n",
        "sys/fs/cgroup/job/step/memory.max": "max",
    },
    "5:cpu:/a\n4:memory,x:/a": {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000000",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "1500000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    },
}


@pytest.mark.parametrize("own", GROUPS, ids=["version 2", "version 1"])
def test_limits_of_control_groups(tmp_path: Path, own: str) -> None:
    for name, text in {"proc/self/cgroup": own, **GROUPS[own]}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_available_memory(tmp_path) == 1_500_000


def test_without_control_groups_the_system_decides(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert 0 < read_available_memory() <= total
    assert 0.01 * total < read_available_memory(tmp_path) <= total
