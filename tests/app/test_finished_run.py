"""A run directory may be a stranger's: it gives no permission, and does not contradict itself."""

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from dist_peft.app import cli
from dist_peft.app.commands.train import train_from_config
from dist_peft.app.finished_run import load_finished_run
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.checkpoint_files import (
    RECORD_NAME,
    format_checksum_record,
    hash_file,
)
from tests.support.tiny_runs import save_config, tiny_tree

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run on an NF4 base, and of what it was made from."""
    directory = tmp_path_factory.mktemp("finished")
    tree = tiny_tree(directory, base__quant={"kind": "nf4"})
    save_config(directory, tree)
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    return directory


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(trained / "run", tmp_path / "run")


def snapshot(directory: Path) -> dict[str, bytes]:
    """Path -> contents of every file."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def change_config(run_dir: Path, key: str, value: Any) -> None:
    file = run_dir / "config.yaml"
    tree = OmegaConf.load(file)
    OmegaConf.update(tree, key, value, merge=False, force_add=True)
    OmegaConf.save(tree, file)


def add_code(base: Path) -> Path:
    """Give a base code of its own; gives the file that the code makes when it runs."""
    file = base / "config.json"
    config = {**json.loads(file.read_text()), "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    config["model_type"] = "unheard-of"
    file.write_text(json.dumps(config))
    ran = base / "ran"
    (base / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'unheard-of'\n"
    )
    return ran


@pytest.mark.parametrize("format", [None, "hf-bf16", "bnb-nf4", "gguf", "peft"])
def test_run_directory_cannot_switch_remote_code_on(
    trained: Path, run_dir: Path, tmp_path: Path, format: str | None, capsys: Any
) -> None:
    base = shutil.copytree(trained / "base", tmp_path / "base")
    ran = add_code(base)
    change_config(run_dir, "base.path", str(base))
    change_config(run_dir, "base.trust_remote_code", True)
    verb = ["merge"] if format is None else ["export", "--format", format]
    command = [*verb, "--run", str(run_dir), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "sets base.trust_remote_code" in capsys.readouterr().err
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_command_line_gives_trust_and_it_is_announced(
    trained: Path, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    base = shutil.copytree(trained / "base", tmp_path / "base")
    ran = add_code(base)
    change_config(run_dir, "base.path", str(base))
    command = ["merge", "--run", str(run_dir), "--out", str(tmp_path / "out"), "--no-verify"]
    assert cli.main(command) == 2 and not ran.exists()  # neither file nor command line: no code
    assert "runs only with base.trust_remote_code=true on the command" in capsys.readouterr().err
    cli.main([*command, "--trust-remote-code"])
    assert ran.exists()
    assert f"code shipped with {base} will run" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "eval", "quantize"])
def test_configuration_file_cannot_switch_remote_code_on(
    verb: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    base = shutil.copytree(trained / "base", tmp_path / "base")
    ran = add_code(base)
    tree = OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    assert isinstance(tree, dict)
    tree["base"] |= {"path": str(base), "trust_remote_code": True}
    tree["save"]["dir"] = str(tmp_path / "run2")
    more = ["--out", str(tmp_path / "out")] if verb == "quantize" else []
    file = save_config(tmp_path, tree)
    assert cli.main([verb, "--config", str(file), *more]) == 2
    assert "on the command line: base.trust_remote_code=true" in capsys.readouterr().err
    assert not ran.exists() and not (tmp_path / "run2").exists()
    assert load_config(file, ["base.trust_remote_code=true"]).base.trust_remote_code


def test_reference_in_a_runs_configuration_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would put a variable of the caller's environment into a model id that goes to the Hub."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    change_config(run_dir, "base.path", "evil/${oc.env:HF_TOKEN}")
    with pytest.raises(UserError, match=r"has a \$\{...\} reference in base.path") as refused:
        load_finished_run(run_dir)
    assert "secret" not in str(refused.value)
    change_config(run_dir, "base.path", "x")
    change_config(run_dir, "data.train", [{"path": "${oc.env:HF_TOKEN}"}])
    with pytest.raises(UserError, match=r"reference in data\.train\[0\]\.path"):
        load_finished_run(run_dir)


@pytest.mark.parametrize("place", ["top", "nested"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_the_hub_are_remote_code(
    trained: Path, tmp_path: Path, place: str, key: str, capsys: Any
) -> None:
    base = shutil.copytree(trained / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    kernel = {key: "stranger/kernel"} if place == "top" else {"text_config": {key: {"": "a/b"}}}
    (base / "config.json").write_text(json.dumps({**config, **kernel}))
    tree = OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    assert isinstance(tree, dict)
    tree["base"]["path"], tree["save"]["dir"] = str(base), str(tmp_path / "run2")
    assert cli.main(["train", "--config", str(save_config(tmp_path, tree))]) == 2
    assert "would download from the Hub and run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base.quant", {"kind": "int", "bits": 4, "group_size": 32}),
        ("base.quant", None),
        ("base.compute_dtype", "bfloat16"),
        ("adapter", {"kind": "qalora"}),
    ],
)
def test_configuration_that_contradicts_the_adapter_is_refused(
    run_dir: Path, tmp_path: Path, key: str, value: Any, capsys: Any
) -> None:
    change_config(run_dir, key, value)
    command = ["merge", "--run", str(run_dir), "--out", str(tmp_path / "out"), "--base", "decoded"]
    assert cli.main(command) == 2
    assert "config.yaml was changed after the training; restore" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "override",
    [
        "base.quant={kind: int, group_size: 32}",  # another base on resume
        "adapter.r=8",
        "data.seq_len=1",
        "data.train=[absent.jsonl]",
        "train.global_batch=0",
        "engine.kind=zero",
        "resume=absent",
        "base.path=absent",
    ],
)
def test_refused_override_changes_nothing(
    trained: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a finished run: a later merge would believe the configuration that was refused. Only its
    log says that there was one."""
    run, config = trained / "run", str(trained / "config.yaml")
    before = snapshot(run)
    assert cli.main(["train", "--config", config, override]) == 2
    after = snapshot(run)
    added = after.pop("log.txt").removeprefix(before.pop("log.txt")).decode()
    assert after == before
    message = capsys.readouterr().err.rpartition("dist-peft: ")[2]
    assert added.count(" ERROR ") == 1 and added.endswith(f" ERROR {message}") and message
    if override.startswith(("adapter", "base.quant")):
        return  # right for a new run
    new = trained / "new"
    assert cli.main(["train", "--config", config, f"save.dir={new}", override]) == 2
    assert not new.exists()


def test_allowed_override_is_kept(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    command = ["train", "--config", str(trained / "config.yaml"), f"save.dir={run}"]
    assert cli.main([*command, "train.steps=4"]) == 0
    assert load_config(run / "config.yaml").train.steps == 4


class MakesFile:
    """Runs when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def plant_bytes_entry(checkpoint: Path, ran: Path) -> None:
    """Turn a parameter of ``checkpoint`` into an entry of bytes that creates ``ran``."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    name = next(n for n in metadata.state_dict_metadata if n.startswith("param/"))
    buffer = io.BytesIO()
    torch.save(MakesFile(str(ran)), buffer)
    (checkpoint / "planted.distcp").write_bytes(buffer.getvalue())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    for index in [i for i in metadata.storage_data if i.fqn == name]:
        del metadata.storage_data[index]
    place = _StorageInfo("planted.distcp", 0, len(buffer.getvalue()))
    metadata.storage_data[MetadataIndex(name)] = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    # checksums find damage, not forgery: a stranger computes them, too
    files = [path for path in checkpoint.iterdir() if path.name != RECORD_NAME]
    checksums = {path.name: hash_file(path) for path in files}
    (checkpoint / RECORD_NAME).write_text(format_checksum_record(checksums))


@pytest.mark.parametrize("way", ["resume path", "resume auto", "eval"])
def test_checkpoint_of_a_stranger_runs_nothing(
    way: str, trained: Path, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    newest = run_dir / "checkpoints" / "step-000003"
    plant_bytes_entry(newest, tmp_path / "ran")
    config = ["--config", str(trained / "config.yaml")]
    command = {
        "resume path": ["train", *config, f"save.dir={tmp_path / 'new'}", f"resume={newest}"],
        "resume auto": ["train", *config, f"save.dir={run_dir}", "train.steps=4"],
        "eval": ["eval", *config, "--run", str(run_dir)],
    }[way]
    assert cli.main(command) == 2
    assert "not a tensor, and reading it could run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    torch.load(newest / "planted.distcp", weights_only=False)  # the planted entry is a real one
    assert (tmp_path / "ran").exists()
