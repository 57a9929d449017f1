"""What is copied out of a base's directory: by a list, and never through a link out of it."""

import json
from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.export.model_directory import copy_tokenizer_files
from dist_peft.model.model_files import (
    check_link_target,
    copy_model_files,
    list_model_files,
    strip_auto_map,
)


def fill(directory: Path, names: list[str], content: str = "{}") -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


BELONGS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE.md",
    "README.md",
]
STAYS = [
    "adapter_config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "onnx/model.onnx",
    "model.onnx",
    "rust_model.ot",
    "consolidated.00.pth",
    "quantize_config.json",
    ".env",
    ".LICENSE.swp",
    "LICENSE.pem",
    "id_rsa",
    "credentials.json",
    "notes.txt",
    "training_args.bin",
    "runs/events.out",
    "additional_chat_templates/.hidden.jinja",
    "additional_chat_templates/secret.txt",
    "modeling_x.py",
]


def test_what_belongs_to_a_model_and_what_stays(tmp_path: Path) -> None:
    fill(tmp_path / "base", BELONGS + STAYS)
    (tmp_path / "out").mkdir()
    copy_model_files(tmp_path / "base", tmp_path / "out", torch.bfloat16, {})
    out = tmp_path / "out"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == set(BELONGS)


def test_links_out_of_the_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = fill(tmp_path / "base", ["config.json", "real/LICENSE"])
    (tmp_path / "key").write_text("secret")
    (base / "NOTICE.txt").symlink_to(tmp_path / "key")
    (base / "LICENSE").symlink_to("real/LICENSE")  # inside: followed
    assert list_model_files(base) == ["LICENSE", "config.json"]
    assert "NOTICE.txt is a link out of" in caplog.text
    for name in ("tokenizer.json", "chat_template.jinja"):
        (base / name).symlink_to(tmp_path / "key")
        with pytest.raises(UserError, match=rf"{name} is a link to .*key.*replace the link"):
            list_model_files(base)
        (base / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", ["default.jinja"])
    (base / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        list_model_files(base)


def test_tokenizer_beside_an_adapter_is_no_link_either(tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", ["adapter_config.json"])
    (tmp_path / "key").write_text("secret")
    (adapter / "tokenizer.json").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="is a link to"):
        copy_tokenizer_files(adapter, tmp_path)


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """All files of a snapshot are links into the repository's blobs."""
    repository = tmp_path / "models--org--name"
    fill(repository / "blobs", ["aa11", "bb22"])
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/aa11")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/bb22")
    assert list_model_files(snapshot) == ["config.json", "tokenizer.json"]
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert list_model_files(linked) == ["config.json", "tokenizer.json"]
    fill(tmp_path / "models--other" / "blobs", ["cc33"])
    (snapshot / "merges.txt").symlink_to("../../../models--other/blobs/cc33")
    with pytest.raises(UserError, match=r"merges\.txt is a link"):
        list_model_files(snapshot)
    with pytest.raises(UserError):
        check_link_target(snapshot / "merges.txt", snapshot)


def test_code_that_auto_map_needs(tmp_path: Path) -> None:
    base = fill(tmp_path / "base", ["evil.py", "unused/__init__.py", "ops/rotary.py"], "")
    mapped = {"AutoModelForCausalLM": "modeling_x.XModel", "AutoConfig": "other/repo--conf.C"}
    (base / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": mapped}))
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (base / "modeling_x.py").write_text(
        "from .ops import attend\nfrom . import shared\nfrom ..outside import z\nimport evil\n"
    )
    (base / "tokenization_x.py").write_text("import torch\n")
    (base / "shared.py").write_text("def f():\n    from .late import g\n")
    (base / "late.py").write_text("from .modeling_x import XModel\n")
    (base / "ops" / "__init__.py").write_text("from .kernels import attend\n")
    (base / "ops" / "kernels.py").write_text("from . import rotary\nfrom ..shared import f\n")
    code = {name for name in list_model_files(base, code=True) if name.endswith(".py")}
    assert code == {
        "late.py",
        "modeling_x.py",
        "ops/__init__.py",
        "ops/kernels.py",
        "ops/rotary.py",
        "shared.py",
        "tokenization_x.py",
    }
    for out, trusted in ((tmp_path / "a", True), (tmp_path / "b", False)):
        out.mkdir()
        copy_model_files(base, out, torch.float32, {}, code=trusted)
        assert (
            (out / "modeling_x.py").is_file() == (out / "ops" / "kernels.py").is_file() == trusted
        )
        for name in ("config.json", "tokenizer_config.json"):
            assert ("auto_map" in json.loads((out / name).read_text())) == trusted


def test_code_that_is_a_link(tmp_path: Path) -> None:
    base = fill(tmp_path / "base", [])
    base.mkdir()
    config = {"auto_map": {"AutoConfig": "conf.C"}}
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "conf.py").write_text("")
    (base / "conf.py").symlink_to(tmp_path / "conf.py")
    assert list_model_files(base) == ["config.json"]
    with pytest.raises(UserError, match=r"conf\.py is a link"):
        list_model_files(base, code=True)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}'])
def test_configurations_without_code(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert strip_auto_map(tmp_path / "x.json") is None
