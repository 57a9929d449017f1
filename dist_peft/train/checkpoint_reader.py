"""Read ``torch.distributed.checkpoint`` files without trusting them.

torch's own reader runs code from a checkpoint in two ways: ``.metadata`` is unpickled, and an
entry that is stored as bytes instead of as a tensor goes through
``torch.load(weights_only=False)``. Our checkpoints hold tensors only, so here

- the classes that ``.metadata`` may name are listed, and any other one is refused by name;
- every entry must be a tensor, whose chunks lie in regular files of the checkpoint's own
  directory (no path, no symbolic link, no stream transformation) that are large enough for it;
- the load planner has no way to read bytes.

Tensors themselves are read by torch with ``weights_only=True``.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from dist_peft.core.errors import UserError
from dist_peft.train.checkpoint_files import check_regular_file

__all__ = ["CheckpointReader", "TensorLoadPlanner"]

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",  # unpickled so that the entry can be named, then refused
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "uint8", "int64"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class CheckpointReader(dcp.FileSystemReader):
    """A ``FileSystemReader`` that reads tensors and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the checkpoint, checked.

        Raises:
            UserError: it holds something that is no metadata, an entry that is no tensor, or a
                reference to anything but a regular file of this directory.
            OSError: ``.metadata`` or a file that it names cannot be read.
        ValueError: files are shorter than their tensors.
        """
        path = Path(self.path) / ".metadata"
        check_regular_file(path)
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} holds no checkpoint metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        _check_metadata_entries(metadata, path)
        return metadata


class TensorLoadPlanner(dcp.DefaultLoadPlanner):
    """A load planner that fills tensors and cannot read bytes, which torch would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise UserError(
            f"checkpoint entry {read_item.storage_index.fqn} is stored as bytes, not as a tensor: "
            "reading it could run code; do not use this checkpoint"
        )


def _check_metadata_entries(metadata: Metadata, path: Path) -> None:
    """Check that every entry is a tensor that the directory's own files can hold.

    Raises:
        UserError: an entry is not.
        ValueError: files are cut off.
    """
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{path}: entry {name!r} is {type(entry).__name__}, not a tensor, and reading it "
                "could run code; checkpoints of this program hold tensors only: do not use it"
            )
    sizes: dict[str, int] = {}
    for index, stored in metadata.storage_data.items():
        name = stored.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise UserError(
                f"{path}: entry {index.fqn!r} lies in {name!r}, which is no name of a file in the "
                "checkpoint's own directory: do not use it"
            )
        if stored.transform_descriptors:
            raise UserError(
                f"{path}: entry {index.fqn!r} is stored transformed "
                f"({stored.transform_descriptors!r}), which checkpoints of this program never are"
            )
        if name not in sizes:
            sizes[name] = check_regular_file(path.with_name(name))
    needed = sum(
        math.prod(entry.size) * entry.properties.dtype.itemsize
        for entry in metadata.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    if needed > sum(sizes.values()):
        raise ValueError(
            f"{path.name} describes {needed} bytes of tensors, and the files it names hold "
            f"{sum(sizes.values())}"
        )


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise UserError(
                f"{self._path} asks for {module}.{name}, which checkpoint metadata never contains: "
                "the file is damaged or was made to do harm; do not use it"
            )
        return super().find_class(module, name)
