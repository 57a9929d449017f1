"""``kill -9`` of a rank: the others leave in time, and the run resumes where its checkpoint is.

Two ranks of torchrun train a tiny model: each on its own GPU, or on the CPU where there are fewer
than two. NCCL's own watchdog is only met with two GPUs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import make_base
from gpu_common import finish, parse_arguments
from random_base import TINY

ROOT = Path(__file__).parents[2]
STEPS = 12
LEAVES_WITHIN = 90
"""Seconds for the other ranks and the launcher after a rank was killed."""


def make_command(scratch: Path, device: str) -> list[str]:
    base = make_base(scratch / "base", **TINY)
    data = scratch / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(64)))
    config = scratch / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "base": {"path": str(base)},
                "data": {"train": [str(data)], "seq_len": 64, "packing": True},
                "train": {"steps": STEPS, "global_batch": 4, "device": device},
                "save": {"dir": str(scratch / "run"), "every": 2},
                "resume": "auto",
            }
        )
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, str(ROOT / "launch" / "train.py"), "--config", str(config)]


def wait_for(found: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found():
            return True
        time.sleep(0.05)
    return False


def find_ranks(launcher: int) -> list[psutil.Process]:
    """The launcher's children that train."""
    children = psutil.Process(launcher).children(recursive=True)
    return [p for p in children if any("train.py" in part for part in p.cmdline())]


def main() -> None:
    args = parse_arguments(__doc__)
    gpus = 0 if args.dry_run else torch.cuda.device_count()
    device = "cuda" if gpus > 1 else "cpu"
    failures: list[str] = []
    result: dict[str, Any] = {"device": device}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        command = make_command(scratch, device)
        log = (scratch / "first.log").open("w")
        first = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            checkpoints = scratch / "run" / "checkpoints"
            saved = wait_for(lambda: any(checkpoints.glob("step-*")), 120)
            ranks = find_ranks(first.pid) if saved and first.poll() is None else []
            if not ranks:
                failures.append("no checkpoint within 120 s: " + tail(scratch / "first.log"))
            else:
                killed = time.monotonic()
                ranks[-1].send_signal(signal.SIGKILL)
                left = wait_for(lambda: first.poll() is not None, LEAVES_WITHIN)
                result["seconds_until_the_others_left"] = time.monotonic() - killed
                result["launcher_exit"] = first.poll()
                if not left or first.poll() == 0:
                    failures.append(f"after kill -9 the launcher's exit code is {first.poll()}")
        finally:
            if first.poll() is None:
                os.killpg(first.pid, signal.SIGKILL)
                first.wait()
        if not failures:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            lines = (scratch / "run" / "metrics.jsonl").read_text().splitlines()
            result["resumed"] = next(
                (line for line in done.stderr.splitlines() if "resum" in line.lower()), None
            )
            result["last_step"] = json.loads(lines[-1])["step"] if lines else None
            if done.returncode or result["last_step"] != STEPS or result["resumed"] is None:
                failures.append(f"the run did not resume: {done.stderr[-2000:]}")
    finish("kill-rank", args, result, failures)


def tail(file: Path) -> str:
    return file.read_text()[-2000:]


if __name__ == "__main__":
    main()
