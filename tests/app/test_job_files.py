"""Job scripts of init: what sinfo says, a script that starts the run, the shipped manifest."""

import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from dist_peft.app.job_files import (
    JobRequest,
    Partition,
    find_partition,
    format_start_line,
    parse_partitions,
    render_kubernetes_job,
    render_slurm_job,
)
from dist_peft.app.package_files import read_package_file

ROOT = Path(__file__).parents[2]
SINFO = "cpu*|12|64|(null)|infinite\ngpu|4|96+|gpu:a100:8(S:0-1)|2-00:00:00\nodd|2|8|gpu:2|30:00\n"


def make_job(directory: Path, nodes: int = 2, gpus: int = 8) -> JobRequest:
    config, file = directory / "run.yaml", directory / "run.sbatch"
    return JobRequest("my run", "a title", config, file, directory, nodes, gpus)


def put_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    for name, text in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_partitions_of_sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_partitions(SINFO + "cpu*|1|1|gpu:9|1:00\nnonsense\n") == [
        Partition("cpu", 12, 64, 0, None, is_default=True),
        Partition("gpu", 4, 96, 8, 2880),
        Partition("odd", 2, 8, 2, 30),
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_partition(None) is None
    put_on_path(tmp_path, monkeypatch, sinfo=f"cat <<'E'\n{SINFO}E")
    assert find_partition(None) == Partition("gpu", 4, 96, 8, 2880)
    assert find_partition("cpu") == Partition("cpu", 12, 64, 0, None, is_default=True)
    assert find_partition("none") is None
    put_on_path(tmp_path, monkeypatch, sinfo="exit 1")
    assert find_partition(None) is None


def test_slurm_script_asks_for_the_cluster_and_starts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs to its end, with commands of SLURM that print their arguments."""
    directory = tmp_path / "with space"
    directory.mkdir()
    text = render_slurm_job(make_job(directory), Partition("gpu", 4, 96, 8, 30), "acc", None)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --time=00:30:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=acc",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --job-name=my_run",
    ):
        assert line in text.splitlines()
    assert text.startswith("#!") and "launch/slurm" not in text.partition("-- signals")[2]
    body = read_package_file("slurm_run.sh").partition("\n\n")[2].rstrip()
    assert body in text and (ROOT / "launch/slurm/run.sh").read_text().endswith(body + "\n")
    (directory / "run.sbatch").write_text(text)
    programs = {"srun": 'pwd; printf "<%s>\\n" "$@"; exit 3', "scontrol": "echo node1"}
    put_on_path(tmp_path, monkeypatch, **programs)
    monkeypatch.setenv("PYTHON", "py")
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(name, value)
    command = ["bash", str(directory / "run.sbatch"), "train.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [
        str(directory),
        *("<--kill-on-bad-exit=1>", "<py>", "<-m>", "<dist_peft>", "<train>"),
        *("<--config>", f"<{directory / 'run.yaml'}>", "<train.lr=1>"),
    ]


@pytest.mark.parametrize(
    ("ranks", "code", "requeued"),
    [
        ('touch "$DIST_PEFT_STOP_FILE"; exit 137', 75, True),  # one was killed as the other ended
        ("exit 137", 137, False),  # out of memory
        ("exit 138", 138, True),
        ('touch "$DIST_PEFT_STOP_FILE"; exit 1', 1, False),
        ("exit 75", 75, True),
    ],
)
def test_slurm_script_requeues_a_stopped_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, code: int, requeued: bool
) -> None:
    (tmp_path / "run.sbatch").write_text(
        render_slurm_job(make_job(tmp_path), Partition("gpu", 4, 96, 8, 30), "acc", None)
    )
    (
        tmp_path / ".dist_peft-stopped.17"
    ).touch()  # of a job that was killed together with its script
    put_on_path(tmp_path, monkeypatch, srun=ranks, scontrol='echo "$@"', squeue="echo RUNNING")
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DIST_PEFT_STOP_FILE", raising=False)
    command = ["bash", str(tmp_path / "run.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("requeue 17" in done.stdout.splitlines()) is requeued
    assert not list(tmp_path.glob(".dist_peft-stopped*"))


def test_slurm_script_without_sinfo(tmp_path: Path) -> None:
    text = render_slurm_job(make_job(tmp_path, 1, 2), None, None, "12:00:00")
    assert "#SBATCH --time=12:00:00" in text and "##SBATCH --partition=NAME" in text
    assert "check every line" in text and "#SBATCH --account" not in text.replace("##", "")


def test_the_shipped_manifest_is_made_of_the_template() -> None:
    shipped = ROOT / "launch" / "k8s" / "pytorchjob.yaml"
    file = shipped.relative_to(ROOT)
    job = JobRequest("NAME", "", Path("run.yaml"), file, ROOT, 2, 8)
    image = "REGISTRY/dist_peft:TAG"
    assert render_kubernetes_job(job, image, "launch/train.py", "/opt/dist_peft") == (
        shipped.read_text()
    )


@pytest.mark.parametrize("nodes", [1, 4])
def test_manifest_of_some_nodes(tmp_path: Path, nodes: int) -> None:
    job = yaml.safe_load(render_kubernetes_job(make_job(tmp_path, nodes, 2), "host/image:1"))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(each["replicas"] for each in replicas.values()) == nodes
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["command"][:4] == ["torchrun", "-m", "dist_peft", "train"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
        assert container["image"] == "host/image:1" and "workingDir" not in container


def test_start_lines() -> None:
    config, job = Path("a b.yaml"), Path("a b.sbatch")
    train = "-m dist_peft train --config 'a b.yaml'"
    assert format_start_line("", config, None, 1, 1) == "dist-peft train --config 'a b.yaml'"
    assert format_start_line("", config, None, 1, 4) == f"torchrun --nproc_per_node 4 {train}"
    several = format_start_line("", config, None, 2, 4)
    assert several.startswith("torchrun --nnodes 2 ") and several.endswith(train)
    assert format_start_line("slurm", config, job, 2, 4) == "sbatch 'a b.sbatch'"
    assert format_start_line("k8s", config, job, 2, 4).endswith("kubectl apply -f 'a b.sbatch'")
