"""Any configuration file and override: a configuration that can be written, or a ``UserError``."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.config.io import dump_config, load_config
from dist_peft.core.config.run import RunConfig
from tests.fuzz.budget import fuzz, try_input
from tests.fuzz.strategies import damaged_bytes, damaged_tree, values

RIGHT: dict[str, Any] = {
    "base": {"path": "base", "quant": {"kind": "int", "bits": 4, "group_size": 64}},
    "adapter": {"kind": "lora", "r": 4, "rank_pattern": {"q_proj": 8}, "target_modules": ["q"]},
    "engine": {"kind": "fsdp2", "shard_group": "all"},
    "data": {"train": [{"path": "a.jsonl", "columns": {"prompt": "q"}}], "eval": ["b.jsonl"]},
    "train": {"steps": 3, "lr": 1e-4, "betas": [0.9, 0.95]},
    "save": {"dir": "run"},
    "resume": "auto",
}
WORDS = (
    *(key for section in RIGHT.values() if isinstance(section, dict) for key in section),
    *("base", "data", "train", "kind", "lora", "ia3", "prompt", "fusion", "bottleneck", "partial"),
    *("${base.path}", "${oc.env:HOME}", "${", "???", "*a", "~", "1e3", "0x10", "1:30"),
)
KEYS = sorted(f"{name}.{key}" for name, keys in RIGHT.items() if name != "resume" for key in keys)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def check(file: Path, content: bytes, overrides: list[str]) -> None:
    file.write_bytes(content)
    config, refusal = try_input(lambda: load_config(file, overrides))
    if refusal is not None:
        assert str(file) in refusal or "override" in refusal
        return
    assert isinstance(config, RunConfig)
    written = file.with_name("written.yaml")
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config


def test_undamaged(file: Path) -> None:
    file.write_text(yaml.safe_dump(RIGHT))
    assert load_config(file).train.steps == 3


@fuzz
@given(tree=damaged_tree(RIGHT, WORDS) | values(*WORDS))
def test_tree(file: Path, tree: Any) -> None:
    check(file, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), [])


@fuzz
@given(content=damaged_bytes(yaml.safe_dump(RIGHT).encode()) | st.binary(max_size=40))
def test_bytes(file: Path, content: bytes) -> None:
    check(file, content, [])


@fuzz
@given(
    key=st.sampled_from(KEYS) | st.text(max_size=10),
    value=st.text(max_size=12) | values(*WORDS).map(yaml.safe_dump) | st.sampled_from(WORDS),
)
def test_override(file: Path, key: str, value: str) -> None:
    check(file, yaml.safe_dump(RIGHT).encode(), [f"{key}={value}"])
