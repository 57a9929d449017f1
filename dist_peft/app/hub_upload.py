"""``--push-to-hub`` of ``merge`` and ``export``: upload a verified output to the Hugging Face hub.

All that can refuse an upload (a wrong name, no token, no network, a repository that others can
read) does so before the output is written, since a merge may take an hour. An output that was not
compared with the trained model is never uploaded. ``--dry-run`` lists the files instead, and asks
the hub nothing.
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from dist_peft.app.model_card import CARD_FILE, find_model_card
from dist_peft.app.verified_export import ExportOutcome
from dist_peft.core.errors import RunFailure, UserError
from dist_peft.core.redaction import redact_text

__all__ = ["HubUpload", "add_upload_arguments", "format_listing", "prepare_upload"]

log = logging.getLogger("dist_peft")


def add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--push-to-hub``, ``--public`` and ``--dry-run``."""
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload the result to this repository of the Hugging Face hub, USER/NAME, once it is "
        "compared with the trained model; a new one is private",
    )
    parser.add_argument(
        "--public", action="store_true", help="with --push-to-hub: anybody may read the repository"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --push-to-hub: write and compare, list the files with their sizes, and upload "
        "nothing; needs no token and no network",
    )


_NAMES_OF_BASE = {
    "adapter_config.json": ("base_model_name_or_path",),
    "dist_peft.json": ("base",),
    "merge_record.json": ("base", "base"),
}
"""Files of an output and the keys, from outside to inside, that lead to the base's name."""


@dataclass(frozen=True)
class HubUpload:
    """A repository, and the output of a command that will be its content.

    Attributes:
        repo: ``USER/NAME``.
        private: only its owner may read the repository.
        out: the directory or the file to upload.
        dry: list the files alone.
    """

    repo: str
    private: bool
    out: Path
    dry: bool = False

    def list_files(self) -> list[tuple[str, int]]:
        """Return the name in the repository and the size in bytes of each file, by name."""
        if self.out.is_file():
            files = self._list_single_file()
        else:
            found = (path for path in self.out.rglob("*") if path.is_file())
            files = {path.relative_to(self.out).as_posix(): path for path in found}
        return [(name, path.stat().st_size) for name, path in sorted(files.items())]

    def _list_single_file(self) -> dict[str, Path]:
        """Return an output of one file and its card, which is next to it, by repository name."""
        card = find_model_card(self.out)
        return {self.out.name: self.out} | ({} if card is None else {CARD_FILE: card})

    def finish(self, outcome: ExportOutcome) -> dict[str, Any]:
        """Upload the output unless ``dry``, and return the fields of ``--json``.

        Raises:
            UserError: the output was not compared with the trained model.
            RunFailure: the hub did not take it; it is complete on disk.
        """
        if outcome.comparison is None:
            raise UserError(
                f"{self.out} was written, but not compared with the trained model (NOT VERIFIED "
                f"above says why), so it is not uploaded to {self.repo}; make the comparison "
                f"possible, or upload it by hand: {self._hand_command}"
            )
        _warn_of_local_base(self.out)
        files = self.list_files()
        url = None if self.dry else self._send_files()
        return {
            "repo": self.repo,
            "private": self.private,
            "dry_run": self.dry,
            "url": url,
            "files": [{"name": name, "bytes": size} for name, size in files],
        }

    def _send_files(self) -> str:
        api = HfApi()
        message = "Upload by dist_peft"

        def send() -> str:
            repo = api.create_repo(self.repo, private=self.private, exist_ok=True)
            if self.out.is_file():
                for name, path in self._list_single_file().items():
                    api.upload_file(
                        path_or_fileobj=path,
                        path_in_repo=name,
                        repo_id=self.repo,
                        commit_message=message,
                    )
            else:
                api.upload_folder(repo_id=self.repo, folder_path=self.out, commit_message=message)
            return str(repo)

        try:
            url = send()
        except Exception as error:  # see _ask_hub
            raise RunFailure(
                f"the upload to {self.repo} failed: {_take_first_line(error)}; {self.out} is "
                f"complete and compared with the trained model: {self._hand_command}"
            ) from None
        log.info("uploaded %s to %s", self.out, url)
        return url

    @property
    def _hand_command(self) -> str:
        access = " --private" if self.private else ""
        return f"hf upload {self.repo} {self.out} .{access}"


def prepare_upload(args: argparse.Namespace) -> HubUpload | None:
    """Return the upload that a command line asks for, or None; before anything is written.

    Args:
        args: with the options of ``add_upload_arguments``, and ``out`` and ``no_verify``.

    Raises:
        UserError: options that contradict each other, a name that the hub does not allow, no
            token, ``HF_HUB_OFFLINE``, no answer of the hub, or a public repository without
            ``--public``.
    """
    repo = args.push_to_hub
    if repo is None:
        for option in ("public", "dry_run"):
            if getattr(args, option):
                raise UserError(f"--{option.replace('_', '-')} is for --push-to-hub REPO")
        return None
    _check_name(repo)
    if args.no_verify:
        raise UserError(
            "--push-to-hub uploads a result that was compared with the trained model; leave out "
            "--no-verify"
        )
    upload = HubUpload(repo, not args.public, args.out, args.dry_run)
    if not upload.dry:
        _check_access(upload)
    return upload


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no user")
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub {repo}: give USER/NAME, of letters, digits, '-', '_' and '.' "
            f"({_take_first_line(error)})"
        ) from None


def _check_access(upload: HubUpload) -> None:
    option = f"--push-to-hub {upload.repo}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{option}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or list the "
            "files with --dry-run"
        )
    if not get_token():
        raise UserError(
            f"{option}: there is no token of the Hugging Face hub; run hf auth login, or set "
            "HF_TOKEN, with a token that may write"
        )
    api = HfApi()
    found = _ask_hub(option, lambda: _is_private(api, upload.repo))
    if found is None:
        _ask_hub(option, api.whoami)  # a wrong token looks like a repository that is not there
    elif upload.private and not found:
        raise UserError(
            f"{option}: this repository is public; pass --public to upload to it, or give another"
        )


def _is_private(api: HfApi, repo: str) -> bool | None:
    """Return whether the repository is private; None: there is none."""
    try:
        return bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return None


def _ask_hub(option: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (
        Exception
    ) as error:  # of the client's HTTP library, which differs from version to version
        raise UserError(f"{option}: the hub refuses it: {_take_first_line(error)}") from None


def _take_first_line(error: Exception) -> str:
    return redact_text(next(iter(str(error).strip().splitlines()), type(error).__name__))


def _warn_of_local_base(out: Path) -> None:
    """Warn where files name the base by a path of this machine, which no other has."""
    found: dict[str, list[str]] = {}
    for name, keys in _NAMES_OF_BASE.items():
        if (out / name).is_file():
            value: Any = json.loads((out / name).read_text(encoding="utf-8"))
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, str) and Path(value).is_absolute():
                found.setdefault(value, []).append(name)
    for base, names in found.items():
        log.warning(
            "%s: the base is named by a path of this machine, %s, which readers of the repository "
            "will see and do not have; train with a hub id as base.path to avoid it",
            ", ".join(names),
            base,
        )


def format_listing(found: dict[str, Any]) -> list[str]:
    """Return the lines of a dry run.

    Args:
        found: of ``HubUpload.finish``.
    """
    files = found["files"]
    total = sum(each["bytes"] for each in files)
    access = "private" if found["private"] else "public"
    lines = [f"would upload {len(files)} files, {total:,} bytes, to {found['repo']} ({access}):"]
    return lines + [f"  {each['bytes']:>16,}  {each['name']}" for each in files]
