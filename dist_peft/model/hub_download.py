"""Download of a model from the Hugging Face hub: the files that are loaded, no others.

Repositories hold the same weights several times (``consolidated.safetensors`` of Mistral's, other
formats' folders). ``store.index`` reads ``model.safetensors``, else the shards that
``model.safetensors.index.json`` names, else all loose files: exactly these are downloaded.

The files arrive in the hub cache, in a few threads of this module, while the main thread asks for
signals: a download of hours ends at once, and the next one resumes with the files that are there.
"""

import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from dist_peft.core.errors import UserError
from dist_peft.core.stop_signals import raise_if_stop_requested
from dist_peft.store.index import INDEX_NAME, SINGLE_NAME

__all__ = ["download_snapshot", "select_weight_files"]

_DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_NUM_THREADS = 4
_LOOK_SECONDS = 0.2


def download_snapshot(
    name: str,
    revision: str | None,
    *,
    weights: bool = True,
    beat: Callable[[], object] = lambda: None,
) -> Path:
    """Download missing files of a repository and return its directory in the hub cache.

    Args:
        name: hub id, ``org/name``.
        revision: branch, tag or commit; None: the main branch.
        weights: of the weights too, besides configuration, tokenizer and code.
        beat: called a few times a second while weights are downloaded.

    Raises:
        OSError: no such repository, no network and not in the cache, no space.
        UserError: the index of the weights is damaged.
        StopRequested: a signal has reached this process.
    """
    raise_if_stop_requested()
    found = Path(snapshot_download(name, revision=revision, allow_patterns=_DESCRIPTION))
    if weights:
        names = select_weight_files(found, _list_repository_files(name, found.name))
        missing = [file for file in names if not (found / file).is_file()]
        _download_files(name, found.name, missing, beat)
    return found


def select_weight_files(directory: Path, listed: list[str]) -> list[str]:
    """Return the weight files that loading will open, as ``store.index.SafetensorsIndex`` does.

    Args:
        directory: snapshot with the repository's JSON files.
        listed: all files of the repository; empty where the hub cannot be asked.

    Raises:
        UserError: the index is damaged or names a file outside of the directory.
    """
    if SINGLE_NAME in listed or (directory / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    index = directory / INDEX_NAME
    if not index.is_file():
        loose = [name for name in listed if "/" not in name and name.endswith(".safetensors")]
        return [name for name in loose if not name.startswith("consolidated")] or loose
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [PurePosixPath(name) for name in names]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {error}; get the base again") from None
    outside = next((p for p in paths if p.is_absolute() or ".." in p.parts), None)
    if outside is not None:
        raise UserError(f"{index} names the file {outside}, which is not in its directory")
    return names


def _list_repository_files(name: str, commit: str) -> list[str]:
    try:
        return HfApi().list_repo_files(name, revision=commit)
    except (HfHubHTTPError, OSError):  # offline: the cache has to do
        return []


def _download_files(name: str, commit: str, files: list[str], beat: Callable[[], object]) -> None:
    """Download ``files`` in threads that do not keep the process alive when it stops.

    Raises:
        OSError: the first error of a file.
        StopRequested: a signal has reached this process.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)
    errors: list[Exception] = []

    def download_waiting_files() -> None:
        while not errors:
            try:
                hf_hub_download(name, waiting.get_nowait(), revision=commit)
            except queue.Empty:
                return
            except Exception as error:  # raised again in the main thread
                errors.append(error)

    threads = [
        threading.Thread(target=download_waiting_files, daemon=True)
        for _ in range(min(_NUM_THREADS, len(files)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                raise_if_stop_requested()
                beat()
                thread.join(_LOOK_SECONDS)
    except BaseException as error:
        errors.append(OSError(str(error)))  # no thread begins another file
        raise
    if errors:
        raise errors[0]
