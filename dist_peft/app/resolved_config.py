"""Resolve the configuration of a command, once.

A configuration file leaves open what the files of the base and of the run decide::

    load_config        defaults, the file, the command line
        |
    resolve_config     base.path   the base that is loaded: of a run with solver gptq, RUN/base
        |              base.quant  of a prequantized base, as its files say
        |              data.chat_template  the text of its file
        v
    ResolvedConfig     frozen; written to config.yaml; a directory of files for the base
        |
    split_tasks        with train.tasks: separate, the run of each task
    split_points       with sweep, the run of each point

No other module of ``app`` derives one configuration from another (a test checks it). GPTQ needs all
ranks and hours, so that it cannot be a part of this: it is a job of its own with a configuration of
its own (``resolve_quantization``), run before, and its result comes in as a ``SolvedBase``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_peft.app.tasks import check_task_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import DataSource, NoAdapterConfig, RunConfig
from dist_peft.core.config.sweep_points import split_sweep_configs
from dist_peft.core.errors import UserError
from dist_peft.data.chat_override import read_chat_template
from dist_peft.model.gptq_factors import has_gptq_factors
from dist_peft.model.hub import resolve_base_directory, warn_of_trusted_code
from dist_peft.model.prequantized.base import check_stated_quant, open_prequantized
from dist_peft.store.index import SafetensorsIndex

__all__ = [
    "ResolvedConfig",
    "SolvedBase",
    "configure_inference",
    "configure_model_directory",
    "configure_replay",
    "find_solved_base",
    "replace_adapter",
    "resolve_config",
    "resolve_finished_run",
    "resolve_one_process",
    "resolve_preview",
    "resolve_preview_files",
    "resolve_pruning",
    "resolve_quantization",
    "resolve_unsolved_run",
    "split_task_configs",
]


@dataclass(frozen=True)
class SolvedBase:
    """The base that GPTQ has quantized for a run.

    Attributes:
        directory: ``base/`` in the directory of the run.
    """

    directory: Path


@dataclass(frozen=True)
class ResolvedConfig:
    """The configuration that a command runs with.

    Attributes:
        run: every key with the value that is used.
        directory: local directory of ``run.base``.
        is_unsolved: ``run.base`` is not quantized, and GPTQ has to quantize it before training.
    """

    run: RunConfig
    directory: Path
    is_unsolved: bool = False

    def split_tasks(self) -> "dict[str, ResolvedConfig]":
        """Return the configuration of each task (``split_task_configs``)."""
        return {
            name: ResolvedConfig(task, self.directory, self.is_unsolved)
            for name, task in split_task_configs(self.run).items()
        }

    def split_points(self) -> "dict[str, ResolvedConfig]":
        """Return the configuration of each point of a sweep (``split_sweep_configs``)."""
        return {
            name: ResolvedConfig(point, self.directory, self.is_unsolved)
            for name, point in split_sweep_configs(self.run).items()
        }


def resolve_config(config: RunConfig, solved: SolvedBase | None = None) -> ResolvedConfig:
    """Return ``config`` with the base that is loaded and its quantization.

    Reads ``config.json`` and the headers of the weights; a hub id is downloaded.

    Args:
        solved: takes the place of ``base.path``.

    Raises:
        UserError: unusable files; ``base.quant`` contradicts them, or asks for GPTQ, which is not a
            way to load a base.
    """
    resolved = _resolve_base(config if solved is None else _use_solved_base(config, solved))
    if resolved.is_unsolved:
        raise UserError(
            f"base.quant.solver is gptq, and base.path {config.base.path} is not quantized: give "
            "the directory that dist-peft quantize wrote, or the base/ of a run"
        )
    return resolved


def replace_adapter(resolved: ResolvedConfig, section: Mapping[str, Any]) -> ResolvedConfig:
    """Return ``resolved`` with another section ``adapter``.

    Raises:
        UserError: a wrong key or value, or one that does not fit the rest.
    """
    tree = {**resolved.run.model_dump(mode="json"), "adapter": dict(section)}
    adapter = parse_config(tree).adapter
    # a copy keeps the references to the environment, which config.yaml has in place of their values
    return replace(resolved, run=resolved.run.model_copy(update={"adapter": adapter}))


def resolve_unsolved_run(config: RunConfig) -> ResolvedConfig:
    """Return ``config`` for the checks of a run before its base is quantized with GPTQ.

    No checkpoint is resumed: checkpoints are of the quantized base.

    Raises:
        UserError: unusable files.
    """
    return _resolve_base(config.model_copy(update={"resume": "never"}))


def resolve_preview(config: RunConfig) -> ResolvedConfig:
    """Return ``config`` for checks before a run, without weights and their headers.

    No checkpoint is resumed. Of a hub id only configuration and tokenizer are downloaded.

    Raises:
        UserError: no such base or chat template.
    """
    warn_of_trusted_code(config.base)
    preview = _read_template(config.model_copy(update={"resume": "never"}))
    return ResolvedConfig(preview, resolve_base_directory(config.base, weights=False))


def resolve_preview_files(preview: ResolvedConfig) -> ResolvedConfig:
    """Return ``preview`` of ``resolve_preview`` with the quantization of the base's files.

    Raises:
        UserError: unusable files.
    """
    return _resolve_base_files(preview.run, preview.directory)


def resolve_quantization(config: RunConfig) -> ResolvedConfig:
    """Return ``config`` for quantizing its base in advance.

    There is no adapter and no backward pass; calibration takes single documents up to any length.

    Raises:
        UserError: unusable files.
    """
    return _resolve_base(_prepare_calibration(config))


def resolve_pruning(config: RunConfig) -> ResolvedConfig:
    """Return ``config`` for pruning its base, which is read unquantized whatever ``base.quant``.

    Raises:
        UserError: unusable files, or a quantized base.
    """
    directory = resolve_base_directory(config.base)
    found = open_prequantized(directory, SafetensorsIndex.open(directory))
    if found is not None:
        raise UserError(
            f"base.path {config.base.path} is quantized already ({found.format_label}), and "
            "weights are pruned before they are quantized; give the unquantized base"
        )
    base = config.base.model_copy(update={"quant": None})
    return _resolve_base(_prepare_calibration(config.model_copy(update={"base": base})))


def _prepare_calibration(config: RunConfig) -> RunConfig:
    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    data = config.data.model_copy(update={"packing": False, "too_long": "truncate"})
    update = {"adapter": NoAdapterConfig(), "sweep": None, "engine": engine, "data": data}
    return config.model_copy(update=update)


def resolve_finished_run(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the ``config.yaml`` of a run, with its solved base where the run directory is now.

    Training wrote everything else resolved. Files of the base are not read: exports of an adapter
    alone do without.
    """
    solved = find_solved_base(config, run_dir)
    return config if solved is None else _use_solved_base(config, solved)


def resolve_one_process(config: RunConfig, run_dir: Path) -> ResolvedConfig:
    """Return the ``config.yaml`` of a run of any number of ranks, for one process without a group.

    Raises:
        UserError: unusable files.
    """
    engine = config.engine.model_copy(update={"kind": "single", "cpu_offload": "none"})
    single = config.model_copy(update={"engine": engine})
    return resolve_config(single, find_solved_base(single, run_dir))


def configure_replay(
    config: RunConfig, run_dir: Path, directory: Path, start: Path | None, every: int, ranks: int
) -> RunConfig:
    """Return the ``config.yaml`` of a run for computing its steps again, in another directory.

    Args:
        start: checkpoint to begin with; None: begin as the run did.
        every: steps between checkpoints.
        ranks: one takes the engine of one process; several that of the run, if it had several.
    """
    found = resolve_finished_run(config, run_dir)
    save = {"dir": str(directory), "every": every, "keep": 1, "keep_best": False, "track": []}
    kind = "single" if ranks == 1 else found.engine.kind
    kind = "auto" if ranks > 1 and kind == "single" else kind
    return found.model_copy(
        update={
            "save": found.save.model_copy(update=save),
            "train": found.train.model_copy(update={"samples": 0, "early_stop": 0}),
            "engine": found.engine.model_copy(update={"kind": kind}),
            "resume": "never" if start is None else str(start),
        }
    )


def configure_inference(config: RunConfig, ranks: int, device: str) -> RunConfig:
    """Return the ``config.yaml`` of a run for forward passes alone, on any number of ranks.

    Several ranks shard the base with FSDP2, whatever engine trained: there is no update for which
    engines differ. Blocks are not recomputed.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    keeps_on_host = config.engine.cpu_offload == "params" and ranks > 1
    update = {
        "kind": "fsdp2" if ranks > 1 else "single",
        "cpu_offload": "params" if keeps_on_host else "none",
        "activation_checkpointing": False,
    }
    engine = config.engine.model_copy(update=update)
    train = config.train.model_copy(update={"device": device})
    return config.model_copy(update={"sweep": None, "engine": engine, "train": train})


def configure_model_directory(
    directory: Path, compute_dtype: str, *, trust_remote_code: bool = False
) -> RunConfig:
    """Return the configuration of a model without an adapter, for ``configure_inference``.

    Its data are not read.

    Args:
        directory: a merged model, or an export in one of the quantized formats that are trained on.
        compute_dtype: as in ``base.compute_dtype``.
    """
    base = {"path": str(directory), "compute_dtype": compute_dtype}
    packed = open_prequantized(directory, SafetensorsIndex.open(directory)) is not None
    tree = {
        "base": base if packed else {**base, "quant": None},
        "adapter": {"kind": "none"},
        "data": {"train": [str(directory)]},
    }
    config = parse_config(tree)
    trusted = config.base.model_copy(update={"trust_remote_code": trust_remote_code})
    return config.model_copy(update={"base": trusted})


def find_solved_base(config: RunConfig, run_dir: Path) -> SolvedBase | None:
    """Return the base that GPTQ has quantized for the run in ``run_dir``, if there is one."""
    quant, directory = config.base.quant, run_dir / "base"
    if quant is None or quant.solver != "gptq" or not directory.is_dir():
        return None
    return SolvedBase(directory)


def _use_solved_base(config: RunConfig, solved: SolvedBase) -> RunConfig:
    update = {"path": str(solved.directory), "revision": None}
    return config.model_copy(update={"base": config.base.model_copy(update=update)})


def _resolve_base(config: RunConfig) -> ResolvedConfig:
    """Locate the base and read the quantization of its files."""
    warn_of_trusted_code(config.base)
    return _resolve_base_files(_read_template(config), resolve_base_directory(config.base))


def _read_template(config: RunConfig) -> RunConfig:
    """Return ``config`` with the text of its chat template: ``config.yaml`` needs no file."""
    if config.data.chat_template is None:
        return config
    update = {"chat_template": read_chat_template(config.data.chat_template)}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def _resolve_base_files(config: RunConfig, directory: Path) -> ResolvedConfig:
    base = config.base
    index = SafetensorsIndex.open(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; base.path must be a Hugging Face model")
    found = open_prequantized(directory, index)
    if found is None:
        solves = base.quant is not None and base.quant.solver == "gptq"
        unsolved = solves and not has_gptq_factors(directory)
        return ResolvedConfig(config, directory, is_unsolved=unsolved)
    check_stated_quant(base, found, directory)
    packed = base.model_copy(update={"quant": found.quant_config})
    return ResolvedConfig(config.model_copy(update={"base": packed}), directory)


# -- tasks ---------------------------------------------------------------------------------------


def split_task_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Return the run configuration of each task by name, in the order of ``data.train``.

    A held-out source belongs to the task of the same name.

    Raises:
        UserError: the configuration does not describe separate tasks; names the key and the fix.
    """
    check_task_config(config)
    return {source.task_name: _make_task_config(config, source) for source in config.data.train}


def _make_task_config(config: RunConfig, source: DataSource) -> RunConfig:
    held_out = [other for other in config.data.eval if other.task_name == source.task_name]
    directory = Path(config.save.dir) / "tasks" / source.task_name
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": [source], "eval": held_out}),
            "train": config.train.model_copy(update={"tasks": "mixed"}),
            "save": config.save.model_copy(update={"dir": str(directory)}),
        }
    )
