"""Reading ``torch.distributed.checkpoint`` files without trusting them.

torch reads a checkpoint's tensors with ``weights_only=True`` but its ``.metadata`` with plain
pickle, which runs whatever a stranger put there. Here the names that a metadata file may use are
listed; anything else is refused by name.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dist_peft.core.errors import UserError

__all__ = ["CheckpointReader"]

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
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
    """A ``FileSystemReader`` that unpickles only what metadata consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint.

        Raises:
            UserError: it holds something that is no metadata.
        """
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} holds no checkpoint metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
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
