"""The adapter of a checkpoint: files that a checkpoint keeps for it, and how to export it.

A stopped run has no ``adapter/``. ``open_trained_run`` makes one of a checkpoint in one process,
in a temporary directory that looks like a finished run. Without a comparison only the adapter's
tensors are read; for a comparison the base is loaded once to compute the trained logits.
"""

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.full.format import WeightsWriter
from dist_peft.adapters.protocol import TrainsBaseWeights
from dist_peft.app.base_content import RECORD_FILE, describe_lineage, read_checkpoint_bases
from dist_peft.app.finished_run import select_training_settings
from dist_peft.app.model_setup import (
    LoadedModel,
    ModelSetup,
    build_model,
    list_adapter_parameters,
    load_init_factors,
    load_training_state,
    load_weights,
)
from dist_peft.app.resolved_config import resolve_one_process
from dist_peft.app.run_consistency import describe_tokenizer
from dist_peft.app.run_directory import write_run_config
from dist_peft.app.tasks import refuse_separate_tasks
from dist_peft.core.config.io import load_run_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.input_paths import refuse_special_files
from dist_peft.core.world import World
from dist_peft.export.verify import Probe
from dist_peft.model.hub import public_base_name, read_json_object, save_tokenizer
from dist_peft.model.quantization_origin import read_quantization_origin
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = [
    "ChatFiles",
    "describe_adapter",
    "format_adapter_files",
    "open_trained_run",
    "read_chat_files",
]

log = logging.getLogger("dist_peft")

_METADATA = "adapter.json"
_TEMPLATE = "chat_template.jinja"
_PROBE = "probe.safetensors"


def describe_adapter(
    config: RunConfig,
    built: LoadedModel,
    turn_end_ids: Sequence[int],
    has_conversations: bool | None,
) -> dict[str, Any]:
    """Return the contents of the adapter's ``dist_peft.json``.

    Args:
        turn_end_ids: tokens that end the turns in the training data.
        has_conversations: whether the training data have conversations; None: unknown.
    """
    head = built.setup.skeleton.head
    return {
        **({} if head is None else {"labels": head.labels}),
        **built.record.to_metadata(),
        **describe_lineage(built.setup.skeleton),
        **select_training_settings(config),
        "start": getattr(config.adapter, "init", "default"),
        "turn_end": list(turn_end_ids),
        **({} if has_conversations is None else {"conversations": has_conversations}),
        **describe_tokenizer(built.setup.tokenizer),
        "dist_peft": importlib.metadata.version("dist_peft"),
        "torch": torch.__version__,
    }


def format_adapter_files(metadata: Mapping[str, Any], chat_template: str | None) -> dict[str, str]:
    """Return the files, by name, that a checkpoint keeps so that an adapter can be made of it.

    Args:
        metadata: contents of the adapter's ``dist_peft.json``.
        chat_template: template of the training data, if it is not the base's own.
    """
    files = {_METADATA: json.dumps(metadata, indent=1)}
    return files if chat_template is None else {**files, _TEMPLATE: chat_template}


@dataclass(frozen=True)
class ChatFiles:
    """How the model of a run converses.

    Attributes:
        ends: tokens that end its turns.
        template: chat template of the training data, if it is not the tokenizer's own.
        conversations: whether the run was trained on conversations; None: unknown.
    """

    ends: tuple[int, ...] = ()
    template: str | None = None
    conversations: bool | None = None


def read_chat_files(path: Path) -> ChatFiles:
    """Return how the model of checkpoint ``path`` converses, from the files of the checkpoint."""
    metadata, template = path / _METADATA, path / _TEMPLATE
    about = read_json_object(metadata) if metadata.is_file() else {}
    found, chats = about.get("turn_end"), about.get("conversations")
    return ChatFiles(
        tuple(token for token in found if type(token) is int) if isinstance(found, list) else (),
        template.read_text(encoding="utf-8") if template.is_file() else None,
        chats if isinstance(chats, bool) else None,
    )


@contextmanager
def open_trained_run(
    run_dir: Path, checkpoint: str | None, *, with_probe: bool, trust_remote_code: bool
) -> Iterator[Path]:
    """Yield a directory with ``config.yaml``, ``adapter/`` and ``probe.safetensors``.

    Args:
        run_dir: a run, finished or not.
        checkpoint: a step, ``best`` or ``last``; None: yield ``run_dir`` itself.
        with_probe: compute the logits of the trained model, which loads the base.
        trust_remote_code: the caller's command line allows the base's code to run.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or its base is another one.
    """
    refuse_special_files(run_dir)
    if checkpoint is None:
        yield run_dir
        return
    with tempfile.TemporaryDirectory(prefix="dist_peft-") as directory:
        view = Path(directory)
        _make_run_of_checkpoint(run_dir, checkpoint, view, with_probe, trust_remote_code)
        yield view


def _make_run_of_checkpoint(
    run_dir: Path, checkpoint: str, view: Path, with_probe: bool, trust_remote_code: bool
) -> None:
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    refuse_separate_tasks(run_dir)
    config, world = load_run_config(file, trust_remote_code=trust_remote_code), World()
    checkpoints = CheckpointManager(run_dir / "checkpoints", 1, world)
    path = checkpoints.find_checkpoint(checkpoint)
    setup = build_model(resolve_one_process(config, run_dir))
    bases = read_checkpoint_bases([path], setup.skeleton.index, setup.config.base.quant)
    if checkpoints.read_position(path).base != setup.base_id:
        raise UserError(
            f"checkpoint {path} was made on another base or another base.quant than {file} names: "
            "restore config.yaml"
        )
    load_init_factors(setup, checkpoints, path)
    probe = Probe.load_probe(run_dir / _PROBE) if with_probe else None
    built = None
    if probe is not None:
        device = world.select_device(config.train.device)
        built = load_weights(setup, world, device, bases)
        built.setup_optimizer(make_optimizer_factory(config.train, device))
        load_training_state(built, checkpoints, path, checkpoints.read_position(path).step)
    view.mkdir(exist_ok=True)
    _write_adapter(setup, built, checkpoints, path, view / "adapter")
    if probe is not None and built is not None:
        logits = _compute_logits(built, probe.input_ids)
        Probe(probe.input_ids, logits, probe.before).save_probe(view / _PROBE)
    write_run_config(view, setup.config)
    log.info("made an adapter of %s", path)


def _write_adapter(
    setup: ModelSetup,
    built: LoadedModel | None,
    checkpoints: CheckpointManager,
    path: Path,
    directory: Path,
) -> None:
    """Write the adapter of checkpoint ``path``; ``built`` is the model with it, if it is loaded."""
    metadata = _read_metadata(setup, path)
    adapter = setup.adapter
    names = list_adapter_parameters(setup.model)
    keys = {name: f"param/{name}" for name in names}
    keys |= {name: f"start/{name}" for name in adapter.list_init_factors()}
    if isinstance(adapter, TrainsBaseWeights):
        sources, infos = adapter.list_source_tensors(), setup.skeleton.tensors
        shapes = {source: infos[source].shape for source in sources.values()}
        about = {**metadata, "kind": setup.config.adapter.kind}
        writer = WeightsWriter(directory, shapes, about)
        for name, source in sources.items():
            key = f"param/{name}"
            writer.write_parameter(source, checkpoints.read_whole_tensors(path, [key])[key])
        writer.close()
    else:
        if built is not None:
            tensors = built.gather_adapter()
        else:
            whole = checkpoints.read_whole_tensors(path, keys.values())
            tensors = {name: whole[key] for name, key in keys.items()}
        origin = read_quantization_origin(setup.directory)
        base = str(origin.get("base") or public_base_name(setup.config.base))
        write_adapter_directory(directory, adapter.to_public_adapter(tensors, base), metadata)
    if (path / _TEMPLATE).is_file():
        template = (path / _TEMPLATE).read_text(encoding="utf-8")
        save_tokenizer(setup.tokenizer, directory, template)


def _read_metadata(setup: ModelSetup, path: Path) -> dict[str, Any]:
    """Return ``dist_peft.json`` of the adapter; incomplete for checkpoints of earlier versions."""
    if (path / _METADATA).is_file():
        return read_json_object(path / _METADATA)
    log.warning(
        "%s was written by an earlier version: the adapter's record of its training is incomplete "
        "(tokens that end a turn, versions)",
        path,
    )
    record = read_json_object(path / RECORD_FILE) if (path / RECORD_FILE).is_file() else {}
    head = setup.skeleton.head
    labels = {} if head is None else {"labels": list(head.labels)}
    start = getattr(setup.config.adapter, "init", "default")
    return {**labels, **record, **select_training_settings(setup.config), "start": start}


def _compute_logits(built: LoadedModel, input_ids: Tensor) -> Tensor:
    with inference_mode(built.model), torch.no_grad():
        ids = input_ids.to(built.engine.device)
        return built.model(input_ids=ids, use_cache=False).logits.float().cpu()
