"""Job scripts that ``dist-peft init`` writes: for SLURM, asking ``sinfo``, and Kubernetes."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dist_peft.app.package_files import read_package_file, render_package_file

__all__ = [
    "JobRequest",
    "Partition",
    "find_partition",
    "format_start_line",
    "parse_partitions",
    "render_kubernetes_job",
    "render_slurm_job",
]

_SINFO = ("sinfo", "--noheader", "--format=%P|%D|%c|%G|%l")
_USUAL_MINUTES, _USUAL_CPUS = 240, 8


@dataclass(frozen=True)
class Partition:
    """A partition of a SLURM cluster.

    Attributes:
        nodes: their number. cpus, gpus: of a node. minutes: limit of a job; None: none.
    """

    name: str
    nodes: int
    cpus: int
    gpus: int
    minutes: int | None
    is_default: bool = False


@dataclass(frozen=True)
class JobRequest:
    """A job of ``nodes`` nodes with ``gpus`` ranks each.

    Attributes:
        config: configuration of the run. file: of the job script.
        root: directory that relative paths of the configuration start from.
    """

    name: str
    title: str
    config: Path
    file: Path
    root: Path
    nodes: int
    gpus: int


def format_start_line(kind: str, config: Path, job_file: Path | None, nodes: int, gpus: int) -> str:
    """Return the command line that starts a run.

    Args:
        kind: of the job script: ``slurm``, ``k8s``, or empty without one.
    """
    config_text, job_text = shlex.quote(str(config)), shlex.quote(str(job_file))
    if kind == "slurm":
        return f"sbatch {job_text}"
    if kind == "k8s":
        make = f"kubectl create configmap dist-peft-run --from-file=run.yaml={config_text}"
        return f"{make} && kubectl apply -f {job_text}"
    program = f"-m dist_peft train --config {config_text}"
    if nodes > 1:
        endpoint = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29400"
        return f"torchrun {endpoint} --nproc_per_node {gpus} {program}"
    if gpus > 1:
        return f"torchrun --nproc_per_node {gpus} {program}"
    return f"dist-peft train --config {config_text}"


def find_partition(name: str | None) -> Partition | None:
    """Return the partition ``name`` of this cluster, or one with GPUs, preferably the default.

    Returns:
        None where there is no SLURM, or no such partition.
    """
    if shutil.which(_SINFO[0]) is None:
        return None
    try:
        done = subprocess.run(_SINFO, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = parse_partitions(done.stdout)
    if name is not None:
        return next((each for each in found if each.name == name), None)
    return max(found, key=lambda each: (each.gpus > 0, each.is_default), default=None)


def parse_partitions(text: str) -> list[Partition]:
    """Return the partitions in the output of ``sinfo``; of several lines of one the first."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 5 or not parts[0]:
            continue
        name, is_default = parts[0].rstrip("*"), parts[0].endswith("*")
        gpus = sum(int(n) for n in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", parts[3]))
        counts = [int(re.sub(r"\D.*", "", part) or 0) for part in parts[1:3]]
        found.setdefault(
            name, Partition(name, counts[0], counts[1], gpus, _parse_limit(parts[4]), is_default)
        )
    return list(found.values())


def _parse_limit(text: str) -> int | None:
    """Return the minutes of ``2-00:00:00``, ``4:00:00`` or ``30:00``; None for ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + minutes


def render_slurm_job(
    job: JobRequest, partition: Partition | None, account: str | None, time: str | None
) -> str:
    """Return a script for ``sbatch``, which needs nothing but this Python and the configuration.

    Args:
        time: limit, such as ``12:00:00``; None: 4 hours, or less where the partition has less.
    """
    minutes, cpus = _USUAL_MINUTES, _USUAL_CPUS
    cluster = "a cluster that it could not ask (no sinfo here): check every line"
    if partition is not None:
        minutes = min(minutes, partition.minutes or minutes)
        cpus = max(1, partition.cpus // max(job.gpus, partition.gpus))
        cluster = (
            f"partition {partition.name}: {partition.nodes} nodes of {partition.cpus} CPUs and "
            f"{partition.gpus} GPUs"
        )
    return render_package_file(
        "job.sbatch.jinja",
        title=job.title,
        file=job.file,
        name=_make_job_name(job.name),
        cluster=cluster,
        nodes=job.nodes,
        gpus=job.gpus,
        cpus=cpus,
        time=time or f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        partition=None if partition is None else partition.name,
        account=account,
        python=shlex.quote(sys.executable),
        root=shlex.quote(str(job.root)),
        config=shlex.quote(str(job.config.absolute())),
        body=read_package_file("slurm_run.sh").partition("\n\n")[2].rstrip(),
    )


def render_kubernetes_job(
    job: JobRequest, image: str, program: str = "-m, dist_peft, train", work_dir: str | None = None
) -> str:
    """Return a ``PyTorchJob`` of the Kubeflow training operator, with a torchrun agent a pod.

    Args:
        image: container image with this package.
        program: arguments of torchrun before those of the run, as items of a YAML list.
        work_dir: working directory in the container; None: that of the image.
    """
    config = "" if str(job.config) == "run.yaml" else f"={job.config}"
    return render_package_file(
        "pytorchjob.yaml.jinja",
        pods={1: "a pod", 2: "two pods"}.get(job.nodes, f"{job.nodes} pods"),
        nodes=job.nodes,
        gpus=job.gpus,
        config=config,
        file=job.file,
        image=image,
        work="" if work_dir is None else f"              workingDir: {work_dir}\n",
        program=program,
        name=job.name,
    )


def _make_job_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:60] or "dist_peft"
