"""``dist-peft inspect PATH``: what is this base, adapter, run or checkpoint."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from dist_peft.adapters.adapterhub_format import is_adapterhub, read_settings
from dist_peft.adapters.peft_format import tensors_file
from dist_peft.adapters.pooling import read_pooling
from dist_peft.adapters.prompt_format import PROMPT_TYPES
from dist_peft.adapters.weights_format import holds_weights
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.prequantized import open_prequantized
from dist_peft.store.index import SafetensorsIndex
from dist_peft.train.checkpoint import Checkpoints
from dist_peft.train.metrics import METRICS_FILE, read_metrics

__all__ = ["describe", "run"]


def run(args: argparse.Namespace, world: World) -> int:
    if world.is_first:
        print("\n".join(describe(args.path)))
    return 0


def describe(path: Path) -> list[str]:
    """Lines that say what ``path`` is and what is in it.

    Raises:
        UserError: there is nothing this project knows at ``path``.
    """
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if (path / "config.yaml").is_file():
        return _run(path)
    if (path / "run.json").is_file():
        return _checkpoint(path)
    if holds_weights(path):
        return _weights(path)
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if path.suffix == ".safetensors" or (path / "config.json").is_file():
        return _base(path)
    raise UserError(
        f"{path} is no base (config.json), adapter (adapter_config.json), run (config.yaml), "
        "checkpoint (run.json) or safetensors file"
    )


def _base(path: Path) -> list[str]:
    index = SafetensorsIndex.open(path)
    infos = index.tensors.values()
    numbers = sum(_numel(i.shape) for i in infos)
    types = Counter(str(i.dtype).removeprefix("torch.") for i in infos)
    what = "parameters"
    lines = [f"base model {path}" if path.is_dir() else f"safetensors file {path}"]
    if (path / "config.json").is_file():
        config = _read_json(path / "config.json")
        kinds = ", ".join(config.get("architectures") or [])
        lines.append(f"  type         {config.get('model_type')} {kinds}")
        if "quantization_config" in config:
            lines.append(f"  quantized    {_quantization(path, index)}")
            what = "numbers"  # several of them, packed, stand for one parameter or for many
    files = len({i.file for i in infos})
    size = sum(i.stop - i.start for i in infos)
    lines += [
        f"  {what:<12} {numbers:,} in {len(index.tensors)} tensors",
        f"  files        {files}, {size / 2**20:,.1f} MiB, "
        + ", ".join(f"{n} x {t}" for t, n in types.most_common()),
        f"  fingerprint  {index.fingerprint()}",
    ]
    return lines


def _quantization(path: Path, index: SafetensorsIndex) -> str:
    try:
        return str(open_prequantized(path, index))
    except UserError as error:
        return f"no base to train on: {error}"


def _adapter(path: Path) -> list[str]:
    config = _read_json(path / "adapter_config.json")
    index = SafetensorsIndex.open(path / tensors_file(config))
    numbers = sum(_numel(i.shape) for i in index.tensors.values())
    lines = [
        f"adapter {path}",
        f"  method       {_method(config)}",
        *_pooling(config),
        f"  base         {config.get('base_model_name_or_path', config.get('model_name'))}",
        f"  parameters   {numbers:,} in {len(index.tensors)} tensors",
    ]
    if "target_modules" in config:
        lines.append(f"  targets      {', '.join(sorted(config['target_modules'] or []))}")
    own = path / "dist_peft.json"
    if own.is_file():
        lines += [f"  {key:<12} {value}" for key, value in _read_json(own).items()]
    return lines


def _weights(path: Path) -> list[str]:
    index = SafetensorsIndex.open(path)
    numbers = sum(_numel(i.shape) for i in index.tensors.values())
    about = _read_json(path / "dist_peft.json")
    return [
        f"trained weights {path}",
        f"  method       {about.pop('kind')} fine-tuning",
        f"  parameters   {numbers:,} in {len(index.tensors)} tensors",
        *(f"  {key:<12} {value}" for key, value in about.items()),
    ]


def _method(config: dict[str, Any]) -> str:
    if is_adapterhub(config):
        found = read_settings(config)
        shown = ("placement", "reduction_factor", "activation", "scaling", "train_layernorm")
        return "bottleneck " + " ".join(f"{name}={getattr(found, name)}" for name in shown)
    kind = config.get("peft_type")
    if kind in PROMPT_TYPES:
        return f"{kind} virtual_tokens={config.get('num_virtual_tokens')}"
    return (
        f"{kind} r={config.get('r')} alpha={config.get('lora_alpha')} "
        f"rslora={config.get('use_rslora', False)} dora={config.get('use_dora', False)}"
    )


def _pooling(config: dict[str, Any]) -> list[str]:
    pooling = read_pooling(config)
    return [f"  pooling      {pooling.convention} of {pooling.size} inputs"] if pooling else []


def _checkpoint(path: Path) -> list[str]:
    position = Checkpoints.position(path)
    lines = [f"checkpoint {path}"]
    return lines + [f"  {key:<12} {value}" for key, value in vars(position).items()]


def _run(path: Path) -> list[str]:
    lines = [f"run {path}"]
    steps = read_metrics(path / METRICS_FILE)
    if steps:
        lines.append(f"  steps        {steps[-1].step}, last loss {steps[-1].loss:.4f}")
    for found in sorted((path / "checkpoints").glob("step-*")):
        lines += ["  " + line for line in _checkpoint(found)]
    adapter = path / "adapter"
    if adapter.is_dir():
        about = _weights(adapter) if holds_weights(adapter) else _adapter(adapter)
        lines += ["  " + line for line in about]
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    return content


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
