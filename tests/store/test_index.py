import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_peft.core.errors import UserError
from dist_peft.store.fingerprint import compute_edges_fingerprint
from dist_peft.store.index import SafetensorsIndex
from tests.support.store_files import INDEX, random_tensor, save_sharded

A, B, C = (random_tensor(torch.float32, (4, 3), seed) for seed in range(3))


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        SafetensorsIndex.open(path)
    return str(caught.value)


# -- what is right ---------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    file = tmp_path / "any-name.safetensors"
    save_file({"b": B, "a": A.half()}, file)
    index = SafetensorsIndex.open(file)
    assert index.path == file
    assert index.files == (file,)
    assert {n: (i.dtype, i.shape) for n, i in index.tensors.items()} == {
        "a": (torch.float16, (4, 3)),
        "b": (torch.float32, (4, 3)),
    }


def test_shards_by_their_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A, "b": B}, {"c": C})
    save_file({"a": A}, tmp_path / "consolidated.safetensors")  # no part of the model
    index = SafetensorsIndex.open(tmp_path)
    assert {n: i.file.name for n, i in index.tensors.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


def test_the_single_file_comes_first_as_in_transformers(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A}, {"b": B})
    save_file({"c": C}, tmp_path / "model.safetensors")
    save_file({"a": A}, tmp_path / "other.safetensors")
    assert SafetensorsIndex.open(tmp_path).tensors.keys() == {"c"}


def test_loose_files(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"b": B}, tmp_path / "y.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    assert [file.name for file in index.files] == ["x.safetensors", "y.safetensors"]
    assert index.tensors.keys() == {"a", "b"}


def test_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": A}, blobs / "0a1b")
    (snapshot / "model.safetensors").symlink_to(blobs / "0a1b")
    assert SafetensorsIndex.open(snapshot).tensors.keys() == {"a"}


@pytest.mark.data
def test_a_real_model(shared_data: Path) -> None:
    index = SafetensorsIndex.open(shared_data / "stories260K-hf")
    assert index.find_tensor("model.embed_tokens.weight").shape == (512, 64)


# -- what is wrong ---------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist; give a directory" in _refusal(tmp_path / "none")
    assert f"directory {tmp_path} has no *.safetensors file" in _refusal(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": A}, file)
    for path in (tmp_path, file):
        message = _refusal(path)
        assert f"{tmp_path} has only pickled weights (pytorch_model.bin)" in message
        assert "loading a pickle can run any code" in message
        assert "save_pretrained(" in message


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert SafetensorsIndex.open(tmp_path).tensors.keys() == {"a"}


def test_shards_without_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A}, {"b": B})
    (tmp_path / INDEX).unlink()
    assert f"model-00001-of-00002.safetensors but no {INDEX}" in _refusal(tmp_path)


def test_a_name_in_two_loose_files(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"a": A}, tmp_path / "y.safetensors")
    message = _refusal(tmp_path)
    assert f"tensor a is in {tmp_path}/x.safetensors and again in {tmp_path}/y" in message


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A, "c": C}, {"a": A, "b": B})
    assert "tensor a is in" in _refusal(tmp_path)


def test_index_names_missing_files(tmp_path: Path) -> None:
    save_sharded(tmp_path, *({str(i): A.clone()} for i in range(5)))
    for i in (1, 2, 4, 5):
        (tmp_path / f"model-{i:05d}-of-00005.safetensors").unlink()
    message = _refusal(tmp_path)
    assert f"{tmp_path / INDEX} names files that are missing: model-00001-of-00005" in message
    assert "model-00004-of-00005.safetensors and 1 more; copy or download them" in message


@pytest.mark.parametrize(
    "place", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
)
def test_index_names_a_tensor_that_is_not_there(tmp_path: Path, place: str) -> None:
    save_sharded(tmp_path, {"a": A}, {"b": B})
    tree = json.loads((tmp_path / INDEX).read_text())
    tree["weight_map"]["ghost"] = place
    (tmp_path / INDEX).write_text(json.dumps(tree))
    assert f"tensor ghost is in {place}, where it is not" in _refusal(tmp_path)


def test_index_names_the_wrong_shard(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A}, {"b": B})
    tree = json.loads((tmp_path / INDEX).read_text())
    tree["weight_map"]["a"] = tree["weight_map"]["b"]
    tree["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(tree))
    assert "tensor a is in model-00002-of-00002.safetensors, where it is" in _refusal(tmp_path)


def test_index_leaves_a_tensor_out(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A, "extra": B}, {"c": C})
    tree = json.loads((tmp_path / INDEX).read_text())
    del tree["weight_map"]["extra"]
    (tmp_path / INDEX).write_text(json.dumps(tree))
    assert "does not name tensors that its files hold: extra" in _refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map of a is 3, not a name of a file here"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a name of a file here"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a name of a file here"),
        ('{"weight_map": {"a": ".."}}', "not a name of a file here"),
        ('{"weight_map": {"a": ""}}', "not a name of a file here"),
    ],
)
def test_wrong_index_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / INDEX).write_text(text)
    message = _refusal(tmp_path)
    assert str(tmp_path / INDEX) in message
    assert words in message


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"a": A}, {"b": B})
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"file {file} is truncated: tensor b ends" in _refusal(tmp_path)


def test_permission_denied_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert f"no permission to read {tmp_path}" in _refusal(tmp_path)


def test_an_unknown_name_shows_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    save_file({"model.layers.0.q_proj.weight": A, "lm_head.weight": B}, file)
    index = SafetensorsIndex.open(file)
    with pytest.raises(
        UserError, match=r"no tensor model.layers.0.q_proj.wait in .*nearest: model"
    ):
        index.find_tensor("model.layers.0.q_proj.wait")
    with pytest.raises(UserError, match=r"it has lm_head.weight, model.layers.0.q_proj.weight"):
        index.find_tensor("zzz")


# -- fingerprint -----------------------------------------------------------------------------------


def _fingerprint(path: Path) -> str:
    return SafetensorsIndex.open(path).compute_fingerprint()


def _save(directory: Path, content: dict[str, torch.Tensor], **metadata: str) -> Path:
    directory.mkdir()
    save_file(content, directory / "model.safetensors", metadata or None)
    return directory


def test_fingerprint_knows_content_not_place_nor_metadata(tmp_path: Path) -> None:
    first = _save(tmp_path / "x", {"a": A, "b": B})
    second = _save(tmp_path / "y", {"a": A, "b": B}, format="pt", note="longer header")
    assert _fingerprint(first) == _fingerprint(second)
    assert _fingerprint(first).startswith("v2:") and len(_fingerprint(first)) == 67


def test_fingerprint_sees_every_difference(tmp_path: Path) -> None:
    changed = A.clone()
    changed[3, 2] += 1
    variants = {
        "base": {"a": A, "b": B},
        "data": {"a": changed, "b": B},
        "name": {"a2": A, "b": B},
        "swapped": {"a": B, "b": A},
        "dtype": {"a": A.view(torch.int32), "b": B},
        "shape": {"a": A.reshape(3, 4), "b": B},
        "fewer": {"a": A},
        "more": {"a": A, "b": B, "c": torch.empty(0)},
        "none": {},
    }
    prints = {_fingerprint(_save(tmp_path / name, content)) for name, content in variants.items()}
    assert len(prints) == len(variants)


def test_fingerprint_samples_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.zeros(100_000, dtype=torch.uint8) for number in range(5)}
    prints = {None: _fingerprint(_save(tmp_path / "same", tensors))}
    for name in tensors:
        changed = {**tensors, name: torch.ones(100_000, dtype=torch.uint8)}
        prints[name] = _fingerprint(_save(tmp_path / name, changed))
    assert len(set(prints.values())) == len(prints)


def test_fingerprint_does_not_depend_on_shards(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    save_sharded(tmp_path / "x", {"a": A}, {"b": B})
    assert _fingerprint(_save(tmp_path / "z", {"a": A, "b": B})) == _fingerprint(tmp_path / "x")
    save_sharded(tmp_path / "x", {"a": A}, {"b": C})
    assert _fingerprint(tmp_path / "z") != _fingerprint(tmp_path / "x")


def test_fingerprint_of_an_earlier_version_is_known(tmp_path: Path) -> None:
    index = SafetensorsIndex.open(_save(tmp_path / "x", {"a": A, "b": B}))
    earlier = compute_edges_fingerprint(index.files, index.tensors.values())
    assert index.matches_fingerprint(earlier) and index.matches_fingerprint(
        index.compute_fingerprint()
    )
    assert not index.matches_fingerprint("0" * 64) and not index.matches_fingerprint(
        "v2:" + earlier
    )


def test_fingerprint_of_a_file_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    save_file({"a": A}, file)
    index = SafetensorsIndex.open(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="changed or was truncated while reading"):
        index.compute_fingerprint()
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        index.compute_fingerprint()
