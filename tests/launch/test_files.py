"""Shipped files that no launcher test starts: they parse, and say what the code understands."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import EngineConfig, TrainConfig
from dist_peft.engine.zero_config import build_deepspeed_config
from tests.launch.conftest import ROOT

LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("deepspeed/*.json")), ids=lambda p: p.name)
def test_deepspeed_json_is_accepted(path: Path) -> None:
    section = json.loads(path.read_text())["zero_optimization"]
    offload = "optimizer" if "offload_optimizer" in section else "none"
    engine = EngineConfig(
        kind="zero",
        stage=section["stage"],
        cpu_offload=offload,
        deepspeed_config=str(path),
    )
    merged = build_deepspeed_config(engine, TrainConfig(), ranks=2)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 50_000_000


@pytest.mark.parametrize(
    "path", sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")]), ids=lambda p: p.name
)
def test_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("slurm/*.sbatch")), ids=lambda p: p.name)
def test_job_script_can_stop_and_resume(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "#SBATCH --signal=B:USR1@300" in lines and "#SBATCH --requeue" in lines
    assert not any(line.startswith("#SBATCH --array") for line in lines)


@pytest.mark.parametrize("file", ["slurm/run.sh", "mpi/train.sh", "k8s/pytorchjob.yaml"])
def test_flight_recorder_is_on(file: str) -> None:
    text = (LAUNCH / file).read_text()
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        assert name in text and name in (ROOT / "docs" / "launchers.md").read_text()


def test_kubernetes_manifest() -> None:
    job = yaml.safe_load((LAUNCH / "k8s" / "pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"][:2] == ["torchrun", "launch/train.py"]


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_and_its_start_lines(path: Path) -> None:
    """Each parses, and its comment starts it through each launcher with scripts that exist."""
    config = load_config(path, [])
    assert config.base.quant is not None and config.resume == "auto"
    comment = [line[1:] for line in path.read_text().splitlines() if line.startswith("#")]
    for launcher in ("torchrun", "deepspeed", "SLURM", "MPI"):
        lines = [line for line in comment if line.strip().startswith(launcher)]
        assert lines, f"{path.name} has no line for {launcher}"
        for line in lines:
            files = [word for word in line.split() if word.startswith(("launch/", "configs/"))]
            assert f"configs/{path.name}" in files
            for name in files:
                assert (ROOT / name).is_file(), name


def test_configurations_cover_the_sizes_people_have() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "llama3_8b_qlora_1x24gb",
        "llama_65b_qlora_2x24gb",
        "llama3_70b_qlora_1x80gb",
        "llama3_70b_qlora_4x8x80gb",
        "qwen2_72b_qlora_8x24gb",
    }
