"""Index of a base's tensors and their byte ranges, from the headers of all its files.

A model is one file or a directory. In a directory the files are, as for ``transformers``, in this
order: ``model.safetensors``; the shards named by ``model.safetensors.index.json``; and otherwise
every ``*.safetensors`` file. Other files of a directory (``consolidated.safetensors`` next to
shards, say) are ignored.

Everything is checked before the first tensor is read: hours into a run is no time to learn that
the last shard was cut off by a full disk.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_file, refuse_special_files
from dist_peft.store.fileio import translate_read_errors
from dist_peft.store.fingerprint import (
    compute_edges_fingerprint,
    compute_sampled_fingerprint,
    is_sampled_fingerprint,
    read_config_meaning,
)
from dist_peft.store.format import TensorInfo, read_tensor_infos

__all__ = ["INDEX_NAME", "SINGLE_NAME", "SafetensorsIndex", "TensorInfo"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_PICKLE_ENDINGS = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class SafetensorsIndex:
    """The tensors of a model.

    Attributes:
        path: the file or directory it was opened with.
        files: its safetensors files, sorted by name.
        tensors: name -> where the bytes are.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsIndex":
        """Read and check the headers of a safetensors file, or of a directory's.

        Raises:
            UserError: missing, pickle only, truncated or corrupt, an unsupported type, a name in
                two files, or an index json that does not fit its files.
        """
        refuse_special_file(path)
        refuse_special_files(path)
        with translate_read_errors(path):
            if path.is_file():
                if path.suffix in _PICKLE_ENDINGS:
                    raise _pickle_only_error(path.parent, [path.name])
                return cls._read_shards(path, [path])
            if not path.is_dir():
                raise UserError(f"{path} does not exist; give a directory with safetensors files")
            if (path / SINGLE_NAME).is_file():
                return cls._read_shards(path, [path / SINGLE_NAME])
            if (path / INDEX_NAME).is_file():
                return cls._read_sharded_directory(path)
            return cls._read_shards(path, _list_loose_files(path))

    @classmethod
    def _read_shards(cls, path: Path, files: Iterable[Path]) -> "SafetensorsIndex":
        files = tuple(sorted(files))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_tensor_infos(file):
                if info.name in tensors:
                    raise UserError(
                        f"tensor {info.name} is in {tensors[info.name].file} and again in {file}; "
                        "remove the file that does not belong to the model"
                    )
                tensors[info.name] = info
        return cls(path, files, tensors)

    @classmethod
    def _read_sharded_directory(cls, path: Path) -> "SafetensorsIndex":
        places = _read_index_json(path / INDEX_NAME)
        names = set(places.values())
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise UserError(
                f"{path / INDEX_NAME} names files that are missing: {_format_some_names(missing)}; "
                "copy or download them"
            )
        index = cls._read_shards(path, {path / name for name in names})
        for name, file_name in places.items():
            if name not in index.tensors or index.tensors[name].file.name != file_name:
                raise UserError(
                    f"{path / INDEX_NAME} says that tensor {name} is in {file_name}, where it is "
                    "not; the index and the files are of different models"
                )
        unnamed = sorted(index.tensors.keys() - places.keys())
        if unnamed:
            raise UserError(
                f"{path / INDEX_NAME} does not name tensors that its files hold: "
                f"{_format_some_names(unnamed)}; the index and the files are of different models"
            )
        return index

    def find_tensor(self, name: str) -> TensorInfo:
        """Return the tensor called ``name``.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        if name in self.tensors:
            return self.tensors[name]
        near = difflib.get_close_matches(name, self.tensors, n=3)
        hint = (
            f"nearest: {', '.join(near)}"
            if near
            else f"it has {_format_some_names(sorted(self.tensors))}"
        )
        raise UserError(f"no tensor {name} in {self.path}; {hint}")

    @cached_property
    def _cached_fingerprint(self) -> str:
        return compute_sampled_fingerprint(self.tensors.values(), read_config_meaning(self.path))

    def compute_fingerprint(self) -> str:
        """Return the sampled fingerprint of the base; see ``store.fingerprint``.

        It is computed once: it is of the files as they were at the first call.

        Raises:
            UserError: a file is gone or shorter than when it was opened.
        """
        return self._cached_fingerprint

    def matches_fingerprint(self, known: str) -> bool:
        """Return whether ``known``, of this version or an earlier one, is this base's fingerprint.

        Raises:
            UserError: a file is gone or shorter than when it was opened.
        """
        if is_sampled_fingerprint(known):
            return known == self.compute_fingerprint()
        return known == compute_edges_fingerprint(self.files, self.tensors.values())


def _list_loose_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory that follows no naming scheme."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLE_ENDINGS)
        if pickles:
            raise _pickle_only_error(directory, pickles)
        raise UserError(f"directory {directory} has no *.safetensors file")
    shards = [file.name for file in files if _SHARD.fullmatch(file.name)]
    if shards:
        raise UserError(
            f"directory {directory} has shards such as {shards[0]} but no {INDEX_NAME}, so that a "
            "missing shard would go unseen; copy or download the index too"
        )
    return files


def _read_index_json(file: Path) -> dict[str, str]:
    """Return tensor name -> file name from a ``model.safetensors.index.json``."""
    with translate_read_errors(file):
        text = file.read_bytes()
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; copy or download it again") from None
    places = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{file} has no weight_map (tensor name -> file name)")
    for name, value in places.items():
        if not isinstance(value, str) or value != Path(value).name or value in ("", ".", ".."):
            raise UserError(f"{file}: weight_map of {name} is {value!r}, not a name of a file here")
    return places


def _pickle_only_error(directory: Path, names: list[str]) -> UserError:
    return UserError(
        f"{directory} has only pickled weights ({_format_some_names(names)}). Only "
        "safetensors are read, as "
        "loading a pickle can run any code. If you trust the files, convert them: python -c "
        f'"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\", and copy "
        "the tokenizer's files there"
    )


def _format_some_names(names: list[str]) -> str:
    """Return at most three names and the number of further ones as text."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
