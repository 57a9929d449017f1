"""Select by name the files of a base that belong to a model derived from it.

A directory may hold weights in other formats, an adapter's configuration (which makes loaders look
for an adapter), secrets and links to anywhere. So files are copied by an allowlist: configuration,
tokenizer, chat templates, processors, licence, and code as far as ``auto_map`` needs it.

A link is followed only inside the directory, and from a snapshot of the Hugging Face cache into the
``blobs`` of the same repository.
"""

import ast
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from dist_peft.core.errors import UserError
from dist_peft.store.fileio import translate_write_errors
from dist_peft.store.writer import write_atomically

__all__ = [
    "check_link_target",
    "copy_file",
    "copy_model_files",
    "list_model_files",
    "strip_auto_map",
]

log = logging.getLogger("dist_peft")

_NEEDED = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json", "vocab-*.json"),
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "feature_extractor_config.json"),
)
"""Files that a model needs if its base has them: without them it would behave differently."""

_DOCUMENTS = (
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "README*",
    "*USE_POLICY*",
    "*POLICY.md",
)
_DOCUMENT_ENDINGS = ("", ".md", ".txt", ".rst", ".pdf")


def list_model_files(directory: Path, *, code: bool = False) -> list[str]:
    """Return the sorted names, relative to ``directory``, of the files that belong to a model.

    Args:
        directory: directory of a base.
        code: include the Python files that ``auto_map`` needs.

    Raises:
        UserError: a file that the model needs is a link out of the directory.
    """
    found = set()
    for path in [*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")]:
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in Path(name).parts) or not path.is_file():
            continue
        if any(fnmatchcase(name, pattern) for pattern in _NEEDED):
            check_link_target(path, directory)
            found.add(name)
        elif _is_document_file(path):
            if _is_inside_directory(path, directory):
                found.add(name)
            else:
                log.warning("%s is a link out of %s and is not copied", path, directory)
    if code:
        found |= set(_iterate_code_files(directory))
    return sorted(found)


def _is_document_file(path: Path) -> bool:
    known = any(fnmatchcase(path.name, pattern) for pattern in _DOCUMENTS)
    return known and path.suffix.lower() in _DOCUMENT_ENDINGS


def check_link_target(path: Path, directory: Path) -> None:
    """Check that ``path`` does not resolve to a file outside ``directory``.

    Raises:
        UserError: ``path`` or one of its parents is a link out of ``directory``.
    """
    if not _is_inside_directory(path, directory):
        raise UserError(
            f"{path} is a link to {path.resolve()}, out of {directory}: its contents could be "
            "anything and are not copied into the output; replace the link by the file"
        )


def _is_inside_directory(path: Path, directory: Path) -> bool:
    root, target = directory.resolve(), path.resolve()
    if target.is_relative_to(root):
        return True
    # Hub cache: models--org--name/snapshots/REVISION/config.json -> ../../blobs/HASH
    cache = root.parent.parent
    in_cache = root.parent.name == "snapshots" and cache.name.startswith(("models--", "datasets--"))
    return in_cache and target.parent == cache / "blobs"


def strip_auto_map(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object without ``auto_map``; None if there is no such key or object."""
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "auto_map" not in content:
        return None
    return {key: value for key, value in content.items() if key != "auto_map"}


def copy_model_files(
    directory: Path,
    out: Path,
    dtype: torch.dtype,
    changes: Mapping[str, Any],
    *,
    code: bool = False,
) -> None:
    """Copy configuration, tokenizer and licence: only the files that ``list_model_files`` lists.

    Args:
        directory: directory of the base.
        out: existing output directory.
        dtype: type that loaders should use.
        changes: further keys of ``config.json``.
        code: the caller trusts the base's own code, which is then copied as far as ``auto_map``
            needs it; else ``auto_map`` is left out.

    Raises:
        UserError: a file is a link out of the directory, the disk is full, or it is not writable.
    """
    for name in list_model_files(directory, code=code):
        if name == "config.json":
            continue  # written last and atomically: without it no loader accepts the directory
        path = directory / name
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        content = None if code else strip_auto_map(path)
        if content is None:
            copy_file(path, out / name)
        else:
            write_atomically(out / name, json.dumps(content, indent=2, ensure_ascii=False))
    config = json.loads((directory / "config.json").read_text())
    for key in ("torch_dtype", "quantization_config"):  # they describe the base, not the output
        config.pop(key, None)
    if not code:
        config.pop("auto_map", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_atomically(out / "config.json", json.dumps({**config, **changes}, indent=2))


def copy_file(source: Path, target: Path) -> None:
    """Copy one file; raises UserError if the disk is full or not writable."""
    with translate_write_errors(target, source.stat().st_size):
        shutil.copyfile(source, target)


# -- code --------------------------------------------------------------------------------------


def _iterate_code_files(directory: Path) -> Iterator[str]:
    """Yield the files of the modules in ``auto_map`` and of all their relative imports."""
    left, seen = sorted(_iterate_mapped_modules(directory)), set[str]()
    while left:
        module = left.pop()
        for name in _list_module_files(module):
            path = directory / name
            if name in seen or not path.is_file():
                continue
            check_link_target(path, directory)
            seen.add(name)
            yield name
            left += _list_relative_imports(path, ".".join(Path(name).parent.parts))


def _list_module_files(module: str) -> list[str]:
    """Return the files that importing the module ``a.b`` may run."""
    names = module.split(".") if module else []
    packages = ["/".join([*names[:i], "__init__.py"]) for i in range(1, len(names) + 1)]
    return [*packages, "/".join(names) + ".py"] if names else []


def _iterate_mapped_modules(directory: Path) -> Iterator[str]:
    """Yield modules in the ``auto_map`` of any configuration.

    Modules of another repository (``org/name--module.Class``) are left out.
    """
    for path in sorted(directory.glob("*.json")):
        if not any(fnmatchcase(path.name, pattern) for pattern in _NEEDED):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        mapped = content.get("auto_map") if isinstance(content, dict) else None
        values = list(mapped.values()) if isinstance(mapped, dict) else []
        for value in (v for own in values for v in (own if isinstance(own, list) else [own])):
            if isinstance(value, str) and "--" not in value and "." in value:
                yield value.rpartition(".")[0]


def _list_relative_imports(path: Path, package: str) -> list[str]:
    """Return modules that a file imports relatively, as dotted paths from the top directory.

    Args:
        path: a Python file; one with syntax errors has no imports.
        package: dotted path of the package that contains the file; empty at the top.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        names = package.split(".") if package else []
        if node.level - 1 > len(names):
            continue  # above the directory
        parent = names[: len(names) - (node.level - 1)]
        stem = [*parent, *(node.module.split(".") if node.module else [])]
        found += [".".join(stem)] if stem else []
        found += [".".join([*stem, alias.name]) for alias in node.names]
    return found
