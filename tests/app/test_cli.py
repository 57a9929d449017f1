"""What a user sees of a mistake: one message, exit code 2, from one rank, on every rank."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dist_peft.app import cli
from dist_peft.app.commands import inspect
from dist_peft.core.log import close_log
from tests.support.forked_commands import run_forked
from tests.support.tiny_runs import save_config, tiny_tree


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def _set(section: str, **values: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, tree: dict[str, Any]) -> None:
        tree[section] = {**tree[section], **values}

    return change


def _write(name: str, text: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(directory: Path, tree: dict[str, Any]) -> None:
        (directory / name).write_text(text)

    return change


def _truncate(directory: Path, tree: dict[str, Any]) -> None:
    file = directory / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _false_index(directory: Path, tree: dict[str, Any]) -> None:
    file = directory / "base" / "model.safetensors"
    shard = "model-00001-of-00001.safetensors"
    names = dict.fromkeys([*load_file(file), "model.layers.9.absent"], shard)
    file.rename(directory / "base" / shard)  # model.safetensors would be read without an index
    index = {"metadata": {}, "weight_map": names}
    (directory / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


def _drop_tensor(directory: Path, tree: dict[str, Any]) -> None:
    file = directory / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


LONG = json.dumps({"prompt": "w5 ", "completion": " ".join(["w6"] * 40)}) + "\n"
MISTAKES: dict[str, tuple[Callable[[Path, dict[str, Any]], None], list[str]]] = {
    "unknown key": (_set("train", learning_rte=1), ["train.learning_rte"]),
    "misspelt key": (_set("train", step=3), ["train.step", "steps"]),
    "wrong type": (_set("train", lr="fast"), ["train.lr"]),
    "missing base": (
        _set("base", path="/nowhere/base"),
        ["base.path /nowhere/base does not exist"],
    ),
    "truncated base": (_truncate, ["model.safetensors"]),
    "index naming absent tensors": (_false_index, ["model.layers.9.absent"]),
    "base without a tensor": (_drop_tensor, ["model.layers.1.mlp.up_proj.weight"]),
    "target that matches nothing": (
        _set("adapter", target_modules=["q_prj"]),
        ["q_prj", "q_proj"],
    ),
    "missing data": (_set("data", train=["/nowhere/a.jsonl"]), ["/nowhere/a.jsonl"]),
    "empty data": (_write("train.jsonl", ""), ["train.jsonl"]),
    "columns": (_write("train.jsonl", '{"ask": "w5", "tell": "w6"}\n'), ["ask", "tell"]),
    "damaged record": (_write("train.jsonl", '{"prompt": "w5"\n'), ["train.jsonl"]),
    "record longer than the window": (
        _write("train.jsonl", LONG),
        ["train.jsonl", "data.too_long"],
    ),
    "checkpoint that does not exist": (
        lambda directory, tree: tree.update(resume="/nowhere/step-000001"),
        ["/nowhere/step-000001"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_tree(tmp_path)
    change, words = MISTAKES[mistake]
    change(tmp_path, tree)
    code = cli.main(["train", "--config", str(save_config(tmp_path, tree))])
    err = capsys.readouterr().err
    assert code == 2, err
    messages = [line for line in err.splitlines() if line.startswith("dist-peft: ")]
    assert len(messages) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not (tmp_path / "run" / "adapter").exists()


def test_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.splitlines() == [
        f"dist-peft: config file {tmp_path / 'none.yaml'} does not exist; give --config a YAML file"
    ]


def test_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(save_config(tmp_path, tiny_tree(tmp_path)))
    assert cli.main(["train", "--config", file, "train.stps=3"]) == 2
    assert "unknown key train.stps; did you mean steps?" in capsys.readouterr().err
    assert cli.main(["train", "--config", file, "train.steps=1"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_unknown_verb_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["fly"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.main(argv)
        assert "usage: dist-peft" in capsys.readouterr().err


def test_unexpected_error_is_a_traceback_and_exit_code_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> list[str]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(inspect, "check_path_chain", broken)
    assert cli.main(["inspect", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: a bug" in err


def test_wrong_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "7")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "RANK=7" in capsys.readouterr().err


def _torchrun(python: str, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "dist_peft", "train", "--config", str(file), *more]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "PYTHON_EXEC": python,
    }
    # both ranks end by themselves, else this is a timeout
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def _check_told_once(errors: str, words: str) -> None:
    messages = [line for line in errors.splitlines() if "dist-peft: " in line]
    assert len(messages) == 1 and words in messages[0], errors
    assert "/dist_peft/" not in errors  # no traceback of ours


@pytest.mark.e2e
@pytest.mark.dist
def test_two_ranks_tell_a_mistake_once(tmp_path: Path, forked_python: str) -> None:
    file = save_config(tmp_path, tiny_tree(tmp_path))
    done = _torchrun(forked_python, file, "data.train=[/nowhere/a.jsonl]")
    assert done.returncode != 0
    _check_told_once(done.stderr, "/nowhere/a.jsonl")
    assert "exitcode  : 2" in done.stderr  # torchrun's own summary of its processes


@pytest.mark.e2e
@pytest.mark.dist
def test_more_ranks_than_rows_are_told_once(tmp_path: Path) -> None:
    file = save_config(tmp_path, tiny_tree(tmp_path))
    command = ["train", "--config", str(file), "train.global_batch=1"]
    ended = run_forked(command, tmp_path, ranks=2)
    assert [rank.code for rank in ended] == [2, 2]
    errors = "".join(rank.stderr for rank in ended)
    _check_told_once(errors, "2 ranks but only 1 train.global_batch")


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(path: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "check_path_chain", interrupt)
    assert cli.main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "dist-peft: interrupted\n"


@pytest.mark.e2e
def test_help_and_version_import_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "dist_peft.core.world")
    code = (
        "import sys\nfrom dist_peft.app.cli import main\n"
        "try:\n    main([sys.argv[1]])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    for option, expected in (("--help", "quantize"), ("--version", "dist-peft ")):
        command = [sys.executable, "-c", code, option]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert expected in done.stdout and done.stdout.endswith("[]\n")


def test_every_command_is_a_module_with_arguments() -> None:
    for name in cli.COMMANDS:
        parser = cli.build_verb_parser([name])
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([name, "--help"])
        assert caught.value.code == 0
