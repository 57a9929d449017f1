"""The commands that faults strike, on tiny models, and what they leave when nothing strikes.

Every number and every byte of a result is compared: the losses, norms and held-out losses of each
step, the adapter and the probe of a training; all files of an export.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.export_runs import llama, save_tokenizer
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import GPTQ, save_config, save_records, tiny_tree

__all__ = ["STEPS", "Job", "Material", "find_leftovers", "read_result"]

STEPS = 3

START_SECONDS = 45.0
"""The longest wait for all ranks at the rendezvous."""

VARYING = {"tokens_per_s", "seconds", "mem_peak", "bytes_gathered", "straggler_share"}
VARYING |= {"rank_rate_min", "rank_rate_median", "rank_rate_max", "slowest_rank"}
"""Metrics that equal runs need not have in common. DeepSpeed keeps gathered parameters for longer
once it has seen a whole step: it gathers other amounts of bytes after a restart."""

EXPORTS = {"peft": "adapter", "gguf": "model.gguf", "bnb-nf4": "nf4", "mlx": "mlx"}
"""Format -> name of the output."""


@dataclass(frozen=True)
class Job:
    """A command to disturb.

    Attributes:
        verb: train, quantize, merge or export.
        engine: of train and quantize.
        form: of export.
        asynchronous: checkpoints are written behind the step.
        solver: train on a base that GPTQ quantizes first.
        verified: the merge or export is loaded by its library and compared.
    """

    verb: str
    engine: str = "single"
    ranks: int = 1
    form: str = ""
    asynchronous: bool = True
    solver: bool = False
    verified: bool = False

    @property
    def reference(self) -> "Job":
        """The job whose undisturbed result is this one's."""
        return Job(self.verb, self.engine, self.ranks, self.form, solver=self.solver)

    @property
    def name(self) -> str:
        parts = [self.verb, self.form, "gptq" * self.solver, "verified" * self.verified]
        if self.verb in ("train", "quantize"):
            parts += [f"{self.engine} {self.ranks}"]
        return " ".join(part for part in parts if part)


def _save_base(directory: Path) -> Path:
    """A tiny Llama with a byte-level BPE tokenizer, which all formats know."""
    save_model(llama(), directory)
    save_tokenizer(directory)
    return directory


class Material:
    """Base, data and configurations, made once in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tree = tiny_tree(
            directory,
            adapter={"r": 5, "alpha": 10, "dropout": 0.1},
            base__quant={"kind": "nf4"},
            train__steps=STEPS,
            train__global_batch=4,
            train__eval_every=2,
            save__keep_best=True,
        )
        tree["data"] |= {"seq_len": 48}
        tree["base"]["path"] = str(_save_base(directory / "bpe"))
        tree["engine"] = {"start_timeout_minutes": START_SECONDS / 60}
        self.train = save_config(directory, tree)
        solved = directory / "solved"
        solved.mkdir()
        tree["data"] |= {"train": [str(save_records(solved / "train.jsonl", 30, 10))]}
        tree["base"] |= {"quant": GPTQ, "compute_dtype": "bfloat16"}
        self.solve = save_config(solved, tree)

    def build_arguments(self, job: Job, place: Path, *, overwrite: bool = False) -> list[str]:
        """Return the command line of ``job``, whose output is in ``place``."""
        if job.verb in ("train", "quantize"):
            solves = job.solver or job.verb == "quantize"
            config = self.solve if solves else self.train
            argv = [job.verb, "--config", str(config), f"engine.kind={job.engine}"]
            if job.verb == "quantize":
                return [*argv, "--out", str(self.get_output(job, place))]
            return [
                *argv,
                f"save.dir={place / 'run'}",
                f"save.asynchronous={str(job.asynchronous).lower()}",
            ]
        run = self.directory / "finished"
        if job.verified:  # whose figures go into the run's report
            run = place / "finished"
            if not run.exists():
                shutil.copytree(self.directory / "finished", run)
        argv = [job.verb, "--run", str(run), "--out", str(self.get_output(job, place))]
        argv += ["--format", job.form] if job.form else []
        argv += [] if job.verified else ["--no-verify"]
        return [*argv, *(["--overwrite"] if overwrite else [])]

    @staticmethod
    def get_output(job: Job, place: Path) -> Path:
        names = {"train": "run", "quantize": "base", "merge": "merged"}
        return place / (names.get(job.verb) or EXPORTS[job.form])


def read_result(job: Job, place: Path) -> dict[str, Any]:
    """Return everything that must not depend on faults."""
    out = Material.get_output(job, place)
    if job.verb != "train":
        return hash_files(out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        f"step {i}": {k: v for k, v in record.items() if k not in VARYING}
        for i, record in enumerate(records)
    }
    result |= {f"adapter/{name}": digest for name, digest in hash_files(out / "adapter").items()}
    result |= {f"base/{name}": digest for name, digest in hash_files(out / "base").items()}
    result["probe"] = hash_bytes((out / "probe.safetensors").read_bytes())
    return result


def hash_files(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file of a directory, by relative name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hash_bytes(_forget_place(f.read_bytes())) for f in files}


def hash_bytes(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _forget_place(contents: bytes) -> bytes:
    """Shorten the path of a base in a run directory, which an adapter's description has."""
    return re.sub(rb'("base": ")[^"\n]*(/run/base")', rb"\1\2", contents)


def compare_results(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference."""
    keys = sorted(found.keys() | expected.keys())
    return [
        f"{key}: {_shorten(found.get(key))}, undisturbed {_shorten(expected.get(key))}"
        for key in keys
        if found.get(key) != expected.get(key)
    ]


def _shorten(value: object) -> str:
    return str(value)[:160]


def find_leftovers(place: Path) -> list[str]:
    """Return hidden files, temporaries and locks below ``place``."""
    return sorted(
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path.name.endswith(".tmp")
        or path.name == "run.lock"
        or path.name.startswith((".partial", ".replaced", ".probe", ".run"))
        or path.name.endswith((".partial", ".replaced"))
    )
