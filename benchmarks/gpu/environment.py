"""The machine: driver, devices, memory, libraries, and which kernels they have."""

import importlib.util
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_common import finish, parse_arguments, pick_device

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "deepspeed", "flash-attn")


def find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ask_driver() -> str | None:
    query = "name,driver_version,memory.total,memory.used,power.limit,mig.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def main() -> None:
    args = parse_arguments(__doc__)
    device = pick_device(args)
    result = {
        "packages": {name: find_version(name) for name in PACKAGES},
        "nvidia_smi": ask_driver(),
        "has_triton": importlib.util.find_spec("triton") is not None,
        "nccl_available": torch.distributed.is_nccl_available(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "devices": torch.cuda.device_count(),
            "memory": properties.total_memory,
            "capability": torch.cuda.get_device_capability(device),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    finish("environment", args, result, [])


if __name__ == "__main__":
    main()
