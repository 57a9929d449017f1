"""Files that many tests need, written once in a process."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SavedFiles:
    """The files of a directory by name. Each test gets its own, which it may damage."""

    contents: dict[str, bytes]

    @classmethod
    def read(cls, directory: Path) -> "SavedFiles":
        return cls({path.name: path.read_bytes() for path in directory.iterdir()})

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents.items():
            (directory / name).write_bytes(content)
