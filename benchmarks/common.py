"""What the benchmarks share: a base to measure on, clean processes, memory readings, output."""

import argparse
import json
import multiprocessing as mp
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig

__all__ = [
    "MIB",
    "RESULTS",
    "Memory",
    "PeakMemory",
    "base_argument",
    "free_port",
    "machine",
    "make_base",
    "print_table",
    "run_config",
    "run_processes",
    "write_result",
]

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


# -- the base ------------------------------------------------------------------------------------


def make_base(directory: Path, **sizes: int) -> Path:
    """A random Llama of 160 M parameters as a Hugging Face directory (bf16), unless it is there.

    94 M parameters are in the blocks' linears, 66 M in embedding and head; ``sizes`` (keys of a
    ``LlamaConfig``) make it another one.
    """
    if (directory / "tokenizer.json").is_file():
        return directory
    usual: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(**{**usual, **sizes}, tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)
    return directory


def base_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--base``."""
    default = Path(tempfile.gettempdir()) / "dist_peft_benchmark_base"
    parser.add_argument("--base", type=Path, default=default, help="made there when absent")


def run_config(base: Path, /, **sections: Mapping[str, Any]) -> RunConfig:
    """NF4 base, LoRA r=16 on all linears; ``sections`` are merged over that."""
    tree: dict[str, dict[str, Any]] = {
        "base": {"path": str(base), "quant": {"kind": "nf4"}},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "train": {"steps": 1},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


# -- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What the kernel says of this process, in bytes.

    ``resident`` counts private (``anonymous``) and file pages; ``high_water`` is the largest
    ``resident`` since the process started, or since ``PeakMemory`` was entered.
    """

    resident: int
    anonymous: int
    high_water: int

    @classmethod
    def now(cls) -> "Memory":
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = (line.partition(":") for line in lines if line.endswith("kB"))
        kib = {key: int(value.split()[0]) for key, _, value in fields}
        return cls(*(kib[key] * 1024 for key in ("VmRSS", "RssAnon", "VmHWM")))


class PeakMemory:
    """Context manager: the largest resident set (exact) and private memory (sampled) inside it.

    The kernel's high-water mark is reset on entry where the kernel permits it. Sampling takes CPU
    time, its own and that of whoever waits for the interpreter: measure seconds in another run.
    """

    def __enter__(self) -> Self:
        # 5: reset the high-water mark (proc_pid_clear_refs(5))
        Path("/proc/self/clear_refs").write_text("5")
        self.before = Memory.now()
        self.anonymous = self.before.anonymous
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = Memory.now()
        self.resident = self.after.high_water

    def _sample(self) -> None:
        while not self._stop.wait(0.003):
            self.anonymous = max(self.anonymous, Memory.now().anonymous)


# -- processes -----------------------------------------------------------------------------------


def run_processes(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], **env: str
) -> list[Any]:
    """Call ``function`` with each of ``arguments`` in a fresh process, all at the same time.

    One thread a process, and ``env`` set before it starts. The function is at module level.
    """
    with _environment({"OMP_NUM_THREADS": "1", **env}):
        context = mp.get_context("spawn")
        with ProcessPoolExecutor(len(arguments), context, max_tasks_per_child=1) as pool:
            futures = [pool.submit(function, *each) for each in arguments]
            return [future.result() for future in futures]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- output --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where and when: processor, cores, memory, device, versions, date."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in info if line.startswith("flags")), [])
    models_ = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models_[0] if models_ else platform.processor(),
        "cpu_flags": [flag for flag in flags if flag.startswith(("avx", "amx", "f16c", "fma"))],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table; floats with one digit."""
    shown = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *shown, strict=True)]
    for line in (list(header), ["-" * w for w in widths], *shown):
        print("| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |")


def write_result(name: str, result: object, directory: Path = RESULTS) -> Path:
    """``DIRECTORY/NAME.json`` with the result and the machine."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "result": result}, indent=1, default=asdict))
    print(f"\nwritten: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
