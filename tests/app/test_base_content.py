"""The base of a run is the one that it was trained on, to the last row."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_peft.app import cli
from dist_peft.app.base_content import RECORD_FILE
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.store.fingerprint import compute_edges_fingerprint
from dist_peft.store.index import SafetensorsIndex
from tests.support import packed
from tests.support.dist import run_ranks
from tests.support.fusion_runs import train_adapters
from tests.support.store_files import save_sharded
from tests.support.story_runs import train
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model
from tests.support.tiny_runs import save_config, save_words, tiny_tree

pytestmark = pytest.mark.e2e

CPU = torch.device("cpu")
MIDDLE = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


def change_middle(base: Path, name: str = MIDDLE) -> None:
    """Other finite values in the middle of a tensor, where no sample is taken."""
    file = base / "model.safetensors"
    before = SafetensorsIndex.open(base).compute_fingerprint()
    tensors = load_file(file)
    flat = tensors[name].view(-1)
    start = len(flat) // 6
    flat[start : start + 8] = flat[start : start + 8].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    assert SafetensorsIndex.open(base).compute_fingerprint() == before


def files_of(directory: Path) -> dict[str, bytes]:
    """All that a refused command must leave as it was."""
    found = (p for p in directory.rglob("*") if p.is_file() and "log" not in p.name)
    return {str(p): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of three steps; its directory is copied by nobody and changed by nobody."""
    tree = tiny_tree(tmp_path_factory.mktemp("finished"), base__quant={"kind": "nf4"})
    assert train(World(), tree) == 0
    close_log()
    return tree


@pytest.fixture
def changed(finished: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The run while its base is another one."""
    base = Path(finished["base"]["path"])
    before = {p: p.read_bytes() for p in (base / "model.safetensors", base / "config.json")}
    yield finished
    for path, content in before.items():
        path.write_bytes(content)


def run_of(tree: dict[str, Any]) -> Path:
    return Path(tree["save"]["dir"])


def test_adapter_and_checkpoints_keep_a_hash_of_every_tensor(finished: dict[str, Any]) -> None:
    about = json.loads((run_of(finished) / "adapter" / "dist_peft.json").read_text())
    names = load_file(Path(finished["base"]["path"]) / "model.safetensors").keys()
    assert about["base_content"]["tensors"].keys() == names
    assert all(len(value) == 18 for value in about["base_content"]["tensors"].values())
    for checkpoint in (run_of(finished) / "checkpoints").iterdir():
        assert json.loads((checkpoint / RECORD_FILE).read_text()).items() <= about.items()


@pytest.mark.parametrize("verb", ["train", "merge", "decoded", "bnb-nf4", "eval"])
def test_change_in_a_middle_tensor_is_refused(
    changed: dict[str, Any], verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_middle(Path(changed["base"]["path"]))
    run, out = str(run_of(changed)), str(tmp_path / "out")
    tree = {**changed, "train": {**changed["train"], "steps": 4}}
    config = str(save_config(tmp_path, tree))
    command = {
        "train": ["train", "--config", config],
        "eval": ["eval", "--config", config, "--run", run],
        "merge": ["merge", "--run", run, "--out", out],
        "decoded": ["merge", "--run", run, "--out", out, "--base", "decoded"],
    }.get(verb, ["export", "--run", run, "--format", verb, "--out", out])
    (run_of(changed) / "config.yaml").unlink(missing_ok=True)
    save_config(run_of(changed), changed)
    before = {k: v for k, v in files_of(run_of(changed)).items() if not k.endswith("config.yaml")}
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert f"was trained on another base than {changed['base']['path']}: 1 of 21 tensors" in told
    assert f"hold other values: {MIDDLE};" in told
    after = files_of(run_of(changed))
    assert {k: v for k, v in after.items() if not k.endswith("config.yaml")} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "merge"])
@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 500000.0), ("rms_norm_eps", 1e-3), ("hidden_act", "gelu")]
)
def test_other_function_of_the_same_weights_is_refused(
    changed: dict[str, Any],
    verb: str,
    key: str,
    value: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = Path(changed["base"]["path"]) / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") if key == "rope_theta" else None
    (rope if rope is not None else config)[key] = value
    file.write_text(json.dumps(config))
    save_config(run_of(changed), changed)
    monkeypatch.setattr("dist_peft.app.python_api.load_weights", None)  # refused before
    tree = {**changed, "train": {**changed["train"], "steps": 4}}
    command = {
        "train": ["train", "--config", str(save_config(tmp_path, tree))],
        "merge": ["merge", "--run", str(run_of(changed)), "--out", str(tmp_path / "out")],
    }[verb]
    assert cli.main(command) == 2
    assert f"{key} is {json.dumps(value).removesuffix('.0')}, was " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_and_remarks_do_not_matter(changed: dict[str, Any], tmp_path: Path) -> None:
    """The same tensors in two files, described by another version of transformers."""
    tensors = load_file(Path(changed["base"]["path"]) / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_words(other)
    names = sorted(tensors)
    save_sharded(other, *({n: tensors[n] for n in part} for part in (names[::2], names[1::2])))
    config = json.loads((Path(changed["base"]["path"]) / "config.json").read_text())
    config |= {"transformers_version": "0", "torch_dtype": "float16", "eos_token_id": 9}
    (other / "config.json").write_text(json.dumps(config))
    tree = {**changed, "base": {**changed["base"], "path": str(other)}}
    save_config(run_of(changed), tree)
    run = str(run_of(changed))
    assert cli.main(["merge", "--run", run, "--out", str(tmp_path / "out"), "--no-verify"]) == 0
    save_config(run_of(changed), changed)


def test_adapter_of_an_earlier_version_is_compared_by_sample(
    changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_of(changed) / "adapter" / "dist_peft.json"
    about = json.loads(before := file.read_text())
    kept = about.pop("base_content")
    index = SafetensorsIndex.open(Path(changed["base"]["path"]))
    about["base_fingerprint"] = compute_edges_fingerprint(index.files, index.tensors.values())
    file.write_text(json.dumps(about))
    save_config(run_of(changed), changed)
    command = ["merge", "--run", str(run_of(changed)), "--no-verify", "--out"]
    try:
        assert cli.main([*command, str(tmp_path / "a")]) == 0
        assert capsys.readouterr().err.count("kept no hashes of the base's rows") == 1
        # one hash of each row, as earlier versions made them
        rowwise = {name: value.partition(":")[2] for name, value in kept["tensors"].items()}
        kept = {"base_content": {**kept, "tensors": rowwise}}
        file.write_text(json.dumps({**about, **kept}))
        assert cli.main([*command, str(tmp_path / "c")]) == 0
        assert capsys.readouterr().err.count("or of another kind") == 1
        about["base_fingerprint"] = "0" * 64
        file.write_text(json.dumps(about))
        assert cli.main([*command, str(tmp_path / "b")]) == 2
        assert "was trained on another base" in capsys.readouterr().err
        file.write_text(json.dumps({**about, "base_content": {"tensors": [1]}}))
        assert cli.main([*command, str(tmp_path / "b")]) == 2
        assert "dist_peft.json is damaged: base_fingerprint or" in capsys.readouterr().err
    finally:
        file.write_text(before)


# -- ranks -----------------------------------------------------------------------------------------

FAMILIES = ("llama-tied-bias", "gemma2", "qwen3_moe")
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {"kind": "fsdp2"},
    "whole": {"kind": "fsdp2", "shard_base": False},
    "zero": {"kind": "zero", "stage": 2},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configurations: tied embeddings, experts in stacks and one by one, prequantized linears."""
    root = tmp_path_factory.mktemp("bases")
    plain = packed.save_plain(root / "plain")
    paths = {
        "gptq": packed.save_gptq(plain, root / "gptq"),
        "bnb": packed.save_bnb(plain, root / "bnb", double_quant=True),
    }
    for family in FAMILIES:
        save_model({**CONFIGS, **MIXTURES}[family], root / family)
        save_words(root / family)
        paths[family] = root / family
    trees = {}
    for name, path in paths.items():
        (root / f"run-{name}").mkdir()
        trees[name] = tiny_tree(root / f"run-{name}")
        trees[name]["base"] = {"path": str(path), "compute_dtype": "float32"}
    return trees


def hashes_of(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    world.join_process_group(CPU)
    found: dict[str, dict[str, str]] = {}
    for name, tree in trees.items():
        config = parse_config(tree)
        found[name] = dict(
            load_weights(build_model(resolve_config(config)), world, CPU).record.tensors
        )
    return found


@pytest.fixture(scope="module")
def alone(bases: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    return hashes_of(World(), bases)


def test_all_tensors_in_use_are_hashed(
    bases: dict[str, dict[str, Any]], alone: dict[str, dict[str, str]]
) -> None:
    for name, tree in bases.items():
        files = SafetensorsIndex.open(Path(tree["base"]["path"])).tensors
        if name in FAMILIES:
            assert alone[name].keys() == files.keys()
        else:
            assert len(alone[name]) == 2 * 9 + 3
            assert MIDDLE in alone[name] and "lm_head.weight" in alone[name]


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "engines"), [(2, ["fsdp2", "whole"]), (3, ["fsdp2", "zero"])])
def test_hashes_do_not_depend_on_ranks_and_engines(
    ranks: int,
    engines: list[str],
    bases: dict[str, dict[str, Any]],
    alone: dict[str, dict[str, str]],
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    trees = {
        f"{name} {kind}": {**tree, "engine": ENGINES[kind]}
        for name, tree in bases.items()
        for kind in engines
    }
    for found in run_ranks(hashes_of, ranks, trees):
        for case, hashes in found.items():
            assert hashes == alone[case.partition(" ")[0]], case


def load_own_copy(world: World, trees: list[dict[str, Any]]) -> str:
    world.join_process_group(CPU)
    config = parse_config(trees[world.rank])
    with pytest.raises(UserError) as caught:
        load_weights(build_model(resolve_config(config)), world, CPU)
    return str(caught.value)


@pytest.mark.dist
def test_ranks_with_other_copies_of_the_base(tmp_path: Path) -> None:
    trees = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trees.append(tiny_tree(tmp_path / name, engine={"kind": "fsdp2", "shard_base": False}))
    change_middle(tmp_path / "b" / "base")
    for told in run_ranks(load_own_copy, 2, trees):
        assert f"ranks have read different bytes of tensor {MIDDLE}" in told


@pytest.mark.dist
def test_resume_is_refused_on_every_rank(changed: dict[str, Any]) -> None:
    change_middle(Path(changed["base"]["path"]))
    tree = {**changed, "train": {**changed["train"], "steps": 4}, "engine": {"kind": "fsdp2"}}
    told = run_ranks(refusal, 2, tree)
    assert len(told) == 2 and all(f"hold other values: {MIDDLE};" in text for text in told)


def refusal(world: World, tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        train(world, tree)
    close_log()
    return str(caught.value)


# -- prequantized, fused, solved -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("gptq", "qweight"), ("gptq", "scales"), ("bnb", "weight"), ("bnb", "weight.absmax")],
)
def test_packed_weights_are_compared(
    bases: dict[str, dict[str, Any]],
    alone: dict[str, dict[str, str]],
    name: str,
    tensor: str,
) -> None:
    path = Path(bases[name]["base"]["path"])
    before = (path / "model.safetensors").read_bytes()
    try:
        tensors = load_file(path / "model.safetensors")
        changed = tensors[MIDDLE.removesuffix("weight") + tensor].view(-1)
        changed[len(changed) // 6] = changed[len(changed) // 6 + 3]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        found = hashes_of(World(), {name: bases[name]})[name]
    finally:
        (path / "model.safetensors").write_bytes(before)
    assert {key for key in found if found[key] != alone[name][key]} == {MIDDLE}


def test_export_of_a_packed_base_compares_it(
    bases: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {**bases["gptq"], "save": {"dir": str(tmp_path / "run"), "every": 0}}
    assert train(World(), tree) == 0
    out = ["--run", str(tmp_path / "run"), "--no-verify", "--out"]
    assert cli.main(["merge", *out, str(tmp_path / "a")]) == 0
    path = Path(tree["base"]["path"])
    before = (path / "model.safetensors").read_bytes()
    try:
        change_middle(path, MIDDLE.replace("weight", "qweight"))
        assert cli.main(["merge", *out, str(tmp_path / "b")]) == 2
        assert cli.main(["export", "--format", "gptq", *out, str(tmp_path / "b")]) == 2
    finally:
        (path / "model.safetensors").write_bytes(before)
    assert capsys.readouterr().err.count(f"hold other values: {MIDDLE};") == 2
    assert not (tmp_path / "b").exists()


def test_fusion_of_adapters_of_another_base(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    fused = train_adapters(tmp_path, tree)
    tree["adapter"] = {"kind": "fusion", "adapters": fused}
    change_middle(tmp_path / "base")
    with pytest.raises(UserError, match=rf"tasks/rte/adapter was trained .* values: {MIDDLE};"):
        train(World(), tree)
    change = load_file(tmp_path / "base" / "model.safetensors")
    change[MIDDLE][0] += 1
    save_file(change, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="a sample of its tensors holds other"):
        build_model(resolve_config(parse_config(tree)))


def test_solved_base_of_a_base_that_changed(tmp_path: Path) -> None:
    quant = {"kind": "int", "group_size": 32, "solver": "gptq"}
    quant |= {"calibration_samples": 2, "calibration_tokens": 8}
    tree = tiny_tree(tmp_path, base__quant=quant, train__steps=1)
    packed.save_plain(tmp_path / "base")
    assert train(World(), tree) == 0
    tree["train"]["steps"] = 2
    file = tmp_path / "base" / "model.safetensors"
    os.utime(file, (1, 1))  # copied: hashed, and found to be the same
    assert train(World(), tree) == 0
    assert "hashing" in (tmp_path / "run" / "log.txt").read_text()
    change_middle(tmp_path / "base")
    with pytest.raises(UserError, match=r"run/base was made from another base\.path: tensors of"):
        train(World(), tree)
