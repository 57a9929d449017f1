"""Installed from a wheel, without the repository: help, init, its scripts, validate, torchrun."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.dist import call_in_process
from tests.support.tiny_runs import save_base, save_records

pytestmark = [pytest.mark.e2e, pytest.mark.dist]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has installed the wheel in, which is built of a copy of the sources."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dist_peft", source / "dist_peft", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), str(source)], root)
    (wheel,) = root.glob("dist_peft-*.whl")
    shutil.rmtree(source)
    target = ["--no-deps", "--no-index", "--no-compile", "--target", str(root / "target")]
    run([*pip, "install", *target, str(wheel)], root)
    return root / "target"


def run(command: list[str], directory: Path, **variables: str) -> str:
    """What a command prints; it has to end with 0."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command,
        cwd=directory,
        env=clean | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def forget_checkout() -> None:
    """Make ``import dist_peft`` import it once more, of the first folder of ``sys.path``."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "dist_peft"]:
        del sys.modules[name]


def prepare_run(installed: str, directory: str) -> tuple[list[int], str]:
    """Runs in a forked process, which has imported the libraries: exit codes, and the output."""
    os.chdir(directory)
    sys.path = [installed, *(place for place in sys.path if not (Path(place) / "tests").is_dir())]
    sys.meta_path = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__name__", f))]
    forget_checkout()
    main = importlib.import_module("dist_peft.app.entry_point").main
    init = ["init", "--base", "base", "--data", "train.jsonl", "--gpu-memory", "24GiB"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        codes = [
            main([*init, "--slurm", "--out", "slurm.yaml"]),
            main([*init, "--k8s", "--out", "k8s.yaml"]),
            main(["validate", "--config", "slurm.yaml", "--no-plan"]),
        ]
    loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "dist_peft"}
    files = [str(module.__file__) for module in loaded.values()]
    assert len(files) > 100 and all(file.startswith(installed) for file in files)
    return codes, printed.getvalue()


def test_commands_without_the_repository(installed: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_records(tmp_path / "train.jsonl", 24)
    path = {"PYTHONPATH": str(installed)}
    shown = run([sys.executable, "-m", "dist_peft", "--help"], tmp_path, **path)
    assert "validate" in shown and "quickstart" in shown
    where = [sys.executable, "-c", "import dist_peft; print(dist_peft.__file__)"]
    assert run(where, tmp_path, **path).startswith(str(installed))
    assert (installed / "bin" / "dist-peft").is_file()

    codes, printed = call_in_process(prepare_run, str(installed), str(tmp_path))
    assert codes == [0, 0, 0] and "ready to train" in printed
    assert "sbatch slurm.sbatch" in printed and "kubectl apply -f k8s.k8s.yaml" in printed
    script = (tmp_path / "slurm.sbatch").read_text()
    assert "srun --kill-on-bad-exit=1" in script and '\nPROGRAM="-m dist_peft train"\n' in script
    manifest = yaml.safe_load((tmp_path / "k8s.k8s.yaml").read_text())
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    command = " ".join(pod["containers"][0]["command"])
    assert "-m dist_peft train" in command and "launch/train.py" not in command

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    train = ["train", "--config", "slurm.yaml", "train.steps=2", "train.device=cpu"]
    run([*launcher, "-m", "dist_peft", *train], tmp_path, **path)
    saved = yaml.safe_load((tmp_path / "slurm.yaml").read_text())["save"]["dir"]
    adapter = tmp_path / saved / "adapter"
    assert {"adapter_model.safetensors", "README.md"} <= {p.name for p in adapter.iterdir()}
