"""Adapters with wrong types, shapes or values are refused before anything is done."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.adapters.directory import (
    check_public_adapter,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.tensor_checks import check_tensor_names, check_tensor_values
from dist_peft.app import cli
from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.export.formats.registry import export_model
from dist_peft.export.merge_weights import merge_model
from tests.support.export_runs import FakeRun, make_run

_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    quant = QuantConfig(kind="int", bits=4, group_size=32)
    return make_run(tmp_path_factory.mktemp("checks"), quant, group=32)


def damaged(run: FakeRun, directory: Path, how: str) -> Path:
    """A copy of the adapter with one tensor changed."""
    copy = Path(shutil.copytree(run.adapter_dir, directory / "adapter"))
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change = {
        "int64": lambda t: (t * 1000).long(),
        "bool": lambda t: t > 0,
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "nan": lambda t: t.index_fill(0, torch.tensor([1]), math.nan),
        "inf": lambda t: t.index_fill(1, torch.tensor([0]), -math.inf),
        "shape": lambda t: torch.cat([t, t], 1),
    }[how]
    tensors[_A] = change(tensors[_A]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    return copy


WORDS = {
    "int64": "up_proj.lora_A.weight is of type int64",
    "bool": "up_proj.lora_A.weight is of type bool",
    "float8": "up_proj.lora_A.weight is of type float8_e4m3fn",
    "nan": "up_proj.lora_A.weight holds nan",
    "inf": "up_proj.lora_A.weight holds -inf",
    "shape": "belongs to another base",
}


@pytest.mark.parametrize("how", WORDS)
def test_merge_refuses_before_anything_is_written(how: str, sound: FakeRun, tmp_path: Path) -> None:
    adapter = damaged(sound, tmp_path, how)
    with pytest.raises(UserError, match=WORDS[how]):
        merge_model(sound.base, sound.directory, adapter, tmp_path / "out", into="decoded")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlx", "gptq", "bnb-nf4", "gguf", "compressed-tensors"])
@pytest.mark.parametrize("how", ["nan", "int64", "shape"])
def test_every_export_refuses(how: str, name: str, sound: FakeRun, tmp_path: Path) -> None:
    job = sound.job(tmp_path / "out", pooled=name == "mlx")
    job = type(job)(**{**vars(job), "adapter_dir": damaged(sound, tmp_path, how)})
    with pytest.raises(UserError, match=WORDS[how]):
        export_model(name, job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["nan", "int64"])
def test_combine_and_inspect(
    how: str, sound: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = damaged(sound, tmp_path, how)
    out = tmp_path / "out"
    assert cli.main(["combine", str(adapter), str(sound.adapter_dir), "--out", str(out)]) == 2
    assert WORDS[how] in capsys.readouterr().err
    assert not out.exists()
    cli.main(["inspect", str(adapter)])
    captured = capsys.readouterr()
    assert WORDS[how] in captured.out + captured.err
    close_log()


def test_types_are_seen_without_values(sound: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int64"):
        read_adapter_directory(damaged(sound, tmp_path, "int64"), values=False)


def test_diverged_adapter_is_not_written(sound: FakeRun, tmp_path: Path) -> None:
    public = read_adapter_directory(sound.adapter_dir)
    check_public_adapter(public)
    public.tensors[_A][0, 0] = math.inf
    with pytest.raises(UserError, match="holds inf"):
        check_public_adapter(public)
    with pytest.raises(RuntimeError, match="refusing to write a damaged adapter"):
        write_adapter_directory(tmp_path / "out", public, {})
    assert not (tmp_path / "out").exists()


def test_types_that_are_trained() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_tensor_values({"a": torch.zeros(3, dtype=dtype)}, "file")
    with pytest.raises(UserError, match="complex64"):
        check_tensor_values({"a": torch.zeros(3, dtype=torch.complex64)}, "file")


def test_a_module_that_was_removed_whole(
    sound: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without both factors a module looks as if it had not been adapted."""
    public, adapter = read_adapter_directory(sound.adapter_dir), tmp_path / "adapter"
    write_adapter_directory(adapter, public, {"tensors": ["stale"]})
    file, module = adapter / "adapter_model.safetensors", _A.removesuffix("lora_A.weight")
    kept = {n: value for n, value in public.tensors.items() if not n.startswith(module)}
    assert len(kept) == len(public.tensors) - 2
    save_file(kept, file, {"format": "pt"})
    message = f"lacks {module}lora_A.weight and 1 more tensors"
    with pytest.raises(UserError, match=message):
        merge_model(sound.base, sound.directory, adapter, tmp_path / "out", into="decoded")
    argv = ["combine", str(adapter), str(sound.adapter_dir), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        read_adapter_directory(adapter, values=False)
    other = _A.replace("layers.1", "layers.9")
    save_file({**public.tensors, other: torch.ones(2, 2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"has {other}, which was not written"):
        read_adapter_directory(adapter)


def test_names_are_compared_only_where_they_are_recorded() -> None:
    check_tensor_names(None, ["a"], "directory")
    check_tensor_names(["b", "a"], ["a", "b"], "directory")
    for recorded in ("a", [1], {"a": 1}):
        with pytest.raises(UserError, match="tensors must be a list of names"):
            check_tensor_names(recorded, ["a"], "directory")


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("adapter_config.json", {"lora_alpha": math.nan}, "no usable r and lora_alpha"),
        ("adapter_config.json", {"lora_alpha": math.inf}, "no usable r and lora_alpha"),
        ("adapter_config.json", {"r": 0}, "no usable r and lora_alpha"),
        ("dist_peft.json", {"adapter": [1]}, "adapter must hold a JSON object"),
        ("dist_peft.json", {"adapter": {"start": "olora"}}, "which no adapter has"),
        ("dist_peft.json", {"labels": 5}, "labels must be a list of names"),
        ("dist_peft.json", {"adapter": {"start": "pissa"}, "start": "default"}, "start is 'pissa'"),
    ],
)
def test_damaged_descriptions(
    file: str, changed: dict[str, object], message: str, sound: FakeRun, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(sound.adapter_dir, tmp_path / "adapter"))
    described = json.loads((adapter / file).read_text()) if (adapter / file).is_file() else {}
    if file == "adapter_config.json":  # as from PEFT: no copy says that the file was edited
        (adapter / "dist_peft.json").unlink(missing_ok=True)
    (adapter / file).write_text(json.dumps(described | changed))
    with pytest.raises(UserError, match=message):
        merge_model(sound.base, sound.directory, adapter, tmp_path / "out", into="decoded")
    assert not (tmp_path / "out").exists()
