"""Origin of a packed base: what it holds, and what of it is compared with a run's inputs."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_quantization
from dist_peft.compress.base_origin import (
    check_origin_contents,
    check_origin_settings,
    describe_origin,
    gather_base_content,
    hash_unread_tensors,
)
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.store.index import SafetensorsIndex
from tests.support.dist import run_ranks
from tests.support.quantized_runs import make_gptq_tree


def make(directory: Path, **changes: Any) -> tuple[RunConfig, SafetensorsIndex]:
    tree = make_gptq_tree(directory)
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    return parse_config(tree), SafetensorsIndex.open(directory / "base")


def save_origin(out: Path, origin: dict[str, Any]) -> Path:
    out.mkdir(exist_ok=True)
    about = {"quantization_config": {"quant_method": "dist_peft", "made_from": origin}}
    (out / "config.json").write_text(json.dumps(about))
    return out


def test_hashes_are_those_of_loading(tmp_path: Path) -> None:
    config, index = make(tmp_path)
    built = load_weights(build_model(resolve_quantization(config)), World(), torch.device("cpu"))
    assert hash_unread_tensors(index, index.tensors, World()) == built.record.tensors
    content = gather_base_content(index, built.record.tensors, World())
    some = dict(list(built.record.tensors.items())[3:])
    assert gather_base_content(index, some, World()) == content


def hash_base(world: World, base: Path) -> dict[str, str]:
    index = SafetensorsIndex.open(base)
    return hash_unread_tensors(index, index.tensors, world)


@pytest.mark.dist
def test_ranks_share_the_reading(tmp_path: Path) -> None:
    make(tmp_path)
    expected = hash_base(World(), tmp_path / "base")
    assert run_ranks(hash_base, 3, tmp_path / "base") == [expected] * 3


def test_settings_are_compared(tmp_path: Path) -> None:
    config, index = make(tmp_path)
    out = save_origin(tmp_path / "out", describe_origin(config, index.compute_fingerprint()))
    check_origin_settings(out, config, index)
    other, _ = make(tmp_path, train={"seed": 5})
    with pytest.raises(UserError, match=r"was made from another calibration \(seed differ\)"):
        check_origin_settings(out, other, index)
    save_origin(out, describe_origin(config, "v2:0"))
    with pytest.raises(UserError, match=r"another base\.path: .*base has changed"):
        check_origin_settings(out, config, index)


def test_rows_are_compared_where_files_are_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, index = make(tmp_path)
    content = gather_base_content(index, {}, World())
    out = save_origin(tmp_path / "out", content)
    with caplog.at_level(logging.INFO, "dist_peft"):
        check_origin_contents(out, index, World())
        assert "hashing" not in caplog.text
        os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
        check_origin_contents(out, index, World())
    assert "hashing" in caplog.text
    save_origin(out, {**content, "content": "2:0"})
    with pytest.raises(UserError, match=r"base\.path: tensors of .*base hold other values"):
        check_origin_contents(out, index, World())
    save_origin(out, {"files": []})  # of an earlier version, without a hash
    check_origin_contents(out, index, World())
