"""Values of the environment are used and not stored; a stranger's reference leads nowhere else."""

from pathlib import Path

import pytest

from dist_peft.core import redaction
from dist_peft.core.config.io import dump_config, load_config, load_run_config, parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError

SECRET = "s3cr3t-value"
TEXT = """
base: {path: "${oc.env:MODELS}/m", revision: "${oc.env:REVISION,null}"}
adapter: {r: "${oc.env:RANK}"}
data:
  train:
    - {path: a.jsonl, template: "${oc.env:MY_TOKEN} {question}"}
    - "${oc.env:TOKEN_DIR}/b.jsonl"
  cache_dir: ${data.train[1]}
save: {dir: "runs/${oc.env:NAME,x}/${train.seed}"}
train: {seed: 3}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(redaction, "_registered", set())
    for name, value in {"MY_TOKEN": SECRET, "RANK": "4", "MODELS": "/models"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKEN_DIR", str(tmp_path))
    (tmp_path / "b.jsonl").touch()
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def stored(config: RunConfig, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(dump_config(config))
    return path


def test_value_is_used_and_the_reference_is_stored(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert config.data.train[0].template == f"{SECRET} {{question}}"
    assert config.adapter.model_dump()["r"] == 4
    text = dump_config(config)
    assert SECRET not in text and str(tmp_path) not in text
    assert "template: ${oc.env:MY_TOKEN} {question}" in text
    assert "path: ${oc.env:TOKEN_DIR}/b.jsonl" in text and "r: ${oc.env:RANK}" in text
    # paths of variables without a secret's name are followed by merges elsewhere
    assert "path: /models/m" in text and "dir: runs/x/3" in text
    assert "revision: ${oc.env:REVISION,null}" in text
    assert load_config(stored(config, tmp_path / "run")) == config  # a resume resolves it again


def test_change_by_the_program_is_stored_as_it_is(file: Path) -> None:
    config = load_config(file)
    sources = [config.data.train[1]]  # a task's configuration: at another place
    data = config.data.model_copy(update={"train": sources, "cache_dir": "/other"})
    text = dump_config(config.model_copy(update={"data": data}))
    assert "path: ${oc.env:TOKEN_DIR}/b.jsonl" in text and "cache_dir: /other" in text


def test_values_are_compared_by_digest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_config(file).dump_stored_tree(with_digests=True)
    assert load_config(file).dump_stored_tree(with_digests=True) == first
    assert first["adapter"]["r"] == 4
    told = first["data"]["train"][0]["template"]
    assert told.startswith("${oc.env:MY_TOKEN} {question} (digest ") and SECRET not in told
    monkeypatch.setenv("MY_TOKEN", "another-value")
    assert load_config(file).dump_stored_tree(with_digests=True) != first


def test_runs_configuration_is_resolved_as_far_as_it_stays_here(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(load_config(file), tmp_path / "run")
    config = load_run_config(path, trust_remote_code=False)
    assert config.adapter.model_dump()["r"] == 4
    assert config.data.train[1].path == f"{tmp_path}/b.jsonl"
    assert config.data.train[0].template == "${oc.env:MY_TOKEN} {question}"  # nothing needs it
    monkeypatch.setenv("TOKEN_DIR", "org/model")
    with pytest.raises(UserError, match=r"reference in data\.train\[1\]\.path that leads"):
        load_run_config(path, trust_remote_code=False)


def test_run_without_its_variable_does_not_resume(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(load_config(file), tmp_path / "run")
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UserError, match="Environment variable 'MY_TOKEN' not found"):
        load_config(path)
    assert load_run_config(path, trust_remote_code=False).data.train[0].template is not None


def test_plain_secrets_are_masked() -> None:
    token = "hf_" + "a" * 30
    tree = {"base": {"path": "https://me:pw@host/m"}, "data": {"train": [{"path": "a"}]}}
    tree["data"]["train"][0]["template"] = f"{token} {{q}}"  # type: ignore[index]
    text = dump_config(parse_config(tree))
    assert token not in text and "me:pw" not in text
    assert "https://***@host/m" in text and "*** {q}" in text
