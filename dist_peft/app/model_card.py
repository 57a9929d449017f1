"""``README.md`` of an adapter or a model: the model card, in the form of the Hugging Face Hub.

It says where the files come from (base, data, losses, hashes), how to load them, and which export
is for which server. All of it is read from the run directory and from the files themselves.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from dist_peft.adapters.directory import find_config_file
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.app.server_support import describe_vllm_support
from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.redaction import redact_text
from dist_peft.export.formats.gguf_lora import LORA_FILE
from dist_peft.export.merge_record import RECORD_NAME, hash_adapter
from dist_peft.model.hub import read_json_object
from dist_peft.store.writer import write_atomically
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = ["ADAPTER", "CARD_FILE", "find_model_card", "write_model_card"]

CARD_FILE = "README.md"
log = logging.getLogger("dist_peft")

BASE_CARD_FILE = "README.base.md"
"""The base's card, where an export has copied it."""

ADAPTER = "adapter"
"""``format_name`` of the run's own ``adapter/``."""

_SERVERS = """\
| server | export |
| --- | --- |
| transformers, vLLM, SGLang (merged) | `dist-peft merge` |
| PEFT, vLLM, SGLang (adapter) | `--format peft` (QA-LoRA `peft-expanded`, experts `peft-experts`) |
| llama.cpp, Ollama | `--format gguf`; the adapter alone: `gguf-lora` |
| mlx-lm | `--format mlx`; the adapter alone: `mlx-adapter` |
"""


def write_model_card(run_dir: Path, output: Path, format_name: str) -> Path:
    """Write the card of ``output``, replacing one that is there.

    A card of a single file, such as ``mine.gguf``, is ``mine.README.md`` in the same directory. A
    base's card in an exported directory is kept as ``README.base.md``; a file of that name which
    is no card of this package is not replaced.

    Args:
        run_dir: the run that it was made of: ``config.yaml``, ``metrics.jsonl``, ``adapter/``.
        output: the run's ``adapter/``, an exported directory, or a single exported file.
        format_name: of the export, or ``ADAPTER``.

    Returns:
        The card's path, whether it was written or not.

    Raises:
        UserError: a file of the run is damaged, or the disk is full.
    """
    config = load_run_config(run_dir / "config.yaml", trust_remote_code=False)
    front = _list_front_matter(config, output)
    name = run_dir if format_name == ADAPTER else output
    lines = ["---", *front, "---", "", f"# {_escape_cell(name.resolve().name)}, {format_name}", ""]
    lines += ["| | |", "| --- | --- |"]
    rows = [
        *_list_origin_rows(config, read_adapter_metadata(run_dir / ADAPTER)),
        *_list_result_rows(run_dir),
        *_list_hashes(run_dir, output),
    ]
    lines += [f"| {label} | {_escape_cell(text)} |" for label, text in rows]
    lines += ["", *_describe_loading(output), "", "Other forms of the same run:", "", _SERVERS]
    path = _place_card(output)
    if path.is_file() and not _is_own_card(path):
        if not output.is_dir():
            log.warning("%s is no card of dist_peft and is kept: no card was written", path)
            return path
        path.replace(output / BASE_CARD_FILE)  # the base's own, with its license
    write_atomically(path, "\n".join(lines))
    return path


def find_model_card(output: Path) -> Path | None:
    """Return the card that ``write_model_card`` wrote of ``output``; None: there is none."""
    path = _place_card(output)
    return path if path.is_file() and _is_own_card(path) else None


def _place_card(output: Path) -> Path:
    return output / CARD_FILE if output.is_dir() else output.with_suffix(f".{CARD_FILE}")


def _is_own_card(path: Path) -> bool:
    return "\n- dist_peft\n" in path.read_text(errors="replace")


def _find_gguf(output: Path) -> Path | None:
    """Return the GGUF file of an export, which is it or holds it; None: of another format."""
    if output.suffix == ".gguf" and output.is_file():
        return output
    return next(iter(sorted(output.glob("*.gguf"))), None)


def _list_front_matter(config: RunConfig, output: Path) -> list[str]:
    lines = [f"library_name: {'peft' if find_config_file(output).is_file() else 'transformers'}"]
    gguf = [] if _find_gguf(output) is None else ["- gguf"]
    if gguf:
        lines = []  # no Python library's
    if not Path(config.base.path).expanduser().exists():  # a hub id; a path is of one machine
        lines.append(f"base_model: {json.dumps(redact_text(config.base.path))}")
    return [*lines, "tags:", "- dist_peft", f"- {config.adapter.kind}", *gguf]


def _list_origin_rows(config: RunConfig, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    quant = config.base.quant
    stored: str = config.base.compute_dtype
    if quant is not None:
        stored = f"{quant.kind}, {quant.bits} bits in groups of {quant.group_size}"
        stored += f" (codec version {about.get('codec_version', 1)})"
    settings = config.adapter.model_dump(include={"r", "alpha", "init"})
    method = " ".join([config.adapter.kind, *(f"{key} {value}" for key, value in settings.items())])
    names = [PurePath(source.path).name or source.path for source in config.data.train]
    held_out = [PurePath(source.path).name or source.path for source in config.data.eval]
    return [
        ("Base", f"{PurePath(config.base.path).name}, frozen, stored as {stored}"),
        ("Method", method),
        ("Training data", ", ".join(names)),
        *([("Held-out data", ", ".join(held_out))] if held_out else []),
        ("Loss on", config.data.loss_on),
    ]


def _list_result_rows(run_dir: Path) -> list[tuple[str, str]]:
    records = read_metrics(run_dir / METRICS_FILE)
    if not records:
        return []
    first, last = records[0], records[-1]
    rows = [("Steps", str(last.step)), ("Training loss", f"{first.loss:.4f} to {last.loss:.4f}")]
    evaluated = [record for record in records if record.eval_loss is not None]
    if evaluated:
        before = first.eval_loss_before
        begin = "" if before is None else f"{before:.4f} to "
        rows.append(("Held-out loss", f"{begin}{evaluated[-1].eval_loss:.4f}"))
    return rows


def _list_hashes(run_dir: Path, output: Path) -> list[tuple[str, str]]:
    about: Mapping[str, Any] = read_adapter_metadata(run_dir / "adapter")
    rows = []
    if isinstance(found := about.get("base_fingerprint"), str):
        rows.append(("Fingerprint of the base", f"`{found}`"))
    held: object = None
    if (output / RECORD_NAME).is_file():
        held = read_json_object(output / RECORD_NAME).get("adapter")
    elif _find_gguf(output) is not None:
        held = hash_adapter(run_dir / ADAPTER)
    if isinstance(held, str) and held:
        return [*rows, ("Hash of the adapter in it", f"`{held}`")]
    for file in sorted(output.glob("adapter*.safetensors")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append((f"SHA-256 of {file.name}", f"`{digest}`"))
    return rows


def _describe_loading(directory: Path) -> list[str]:
    file = find_config_file(directory)
    if (gguf := _find_gguf(directory)) is not None:
        if gguf.name == LORA_FILE:
            return [f"llama.cpp: `llama-server -m BASE.gguf --lora {gguf.name}`"]
        return [
            f"llama.cpp: `llama-server -m {_escape_cell(gguf.name)}`; Ollama: a `Modelfile` with "
            f"`FROM ./{_escape_cell(gguf.name)}`."
        ]
    if not file.is_file():
        if not (directory / "config.json").is_file():
            return ["Make a model of the run with `dist-peft merge`."]
        return ["```python", 'AutoModelForCausalLM.from_pretrained("DIRECTORY")', "```"]
    config = read_json_object(file)
    if config.get("peft_type") == "QALORA":
        return [
            "PEFT does not read this directory: QA-LoRA with sums is this project's own form. "
            "`dist-peft export --format peft-expanded` writes the same adapter as plain LoRA."
        ]
    if "peft_type" not in config:
        return [
            "mlx-lm: `mlx_lm.generate --model BASE --adapter-path DIRECTORY`"
            if "lora_parameters" in config
            else "Loaded by AdapterHub's `adapters` library."
        ]
    return [
        "```python",
        'PeftModel.from_pretrained(base, "DIRECTORY")',
        "```",
        "",
        f"Served as an adapter by vLLM: {describe_vllm_support(config)}.",
    ]


def _escape_cell(text: str) -> str:
    return redact_text(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
