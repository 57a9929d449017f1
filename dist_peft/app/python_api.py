"""The Python API: ``from dist_peft import load, attach, merge_run, export_run`` (docs/python.md).

The commands call the same functions: ``train`` loads with ``load_with_adapter`` and trains with
``AdapterTraining``, ``merge`` and ``export`` call ``merge_run`` and ``export_run``.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dist_peft.app.adapter_training import AdapterTraining
from dist_peft.app.base_content import BaseRequirement
from dist_peft.app.checkpoint_adapter import open_trained_run
from dist_peft.app.data_initialization import initialize_from_data
from dist_peft.app.data_setup import DataLoaders, check_loaders_fit_model
from dist_peft.app.document_isolation import check_document_isolation, count_packed_tokens
from dist_peft.app.model_setup import LoadedModel, ModelSetup, build_model, load_weights
from dist_peft.app.rank_setup import download_base_once, join_ranks
from dist_peft.app.resolved_config import ResolvedConfig, replace_adapter, resolve_config
from dist_peft.app.resuming import read_run_inputs
from dist_peft.app.verified_export import (
    VERIFY,
    ExportOutcome,
    VerificationOptions,
    export_finished_run,
    merge_finished_run,
)
from dist_peft.core.closing import ClosedAtExit
from dist_peft.core.config.io import load_config, parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.export.formats.registry import FORMATS
from dist_peft.train.optimizers import make_optimizer_factory

__all__ = ["LoadedBase", "attach", "export_run", "load", "load_with_adapter", "merge_run"]

MergeInto = Literal["original", "decoded"]


@dataclass(frozen=True)
class LoadedBase(ClosedAtExit):
    """A base that was found, and the ranks that will share it. Weights are read by ``attach``,
    since a base is sharded together with its adapter.

    Use it in a ``with`` statement: at its end the ranks leave the process group.

    Attributes:
        resolved: the configuration, with the base that is used and its quantization.
        world: the ranks.
        device: that this rank computes on.
    """

    resolved: ResolvedConfig
    world: World
    device: torch.device

    def close(self) -> None:
        """Leave the process group."""
        self.world.leave_process_group()


def load(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    world: World | None = None,
) -> LoadedBase:
    """Read a configuration, join the ranks of the launcher, and find its base. Collective.

    Args:
        config: a YAML file, its contents as a mapping, or a configuration.
        overrides: ``key.sub=value`` for a YAML file, as on the command line.
        world: the ranks; None: those of the launcher's variables, or one process.

    Raises:
        UserError: on every rank: a wrong configuration, no such base, or a rank did not come.
    """
    given = _read_config(config, overrides)
    for key, is_set in (
        ("train.tasks separate", given.train.tasks == "separate"),
        ("sweep", given.sweep is not None),
    ):
        if is_set:
            raise UserError(f"{key} has several adapters: use dist-peft train")
    world = World.detect_world() if world is None else world
    device = join_ranks(given, world)
    download_base_once(given.base, world)
    with world.raise_together("read the base's configuration"):
        return LoadedBase(resolve_config(given), world, device)


def _read_config(
    config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str]
) -> RunConfig:
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if overrides:
        raise UserError("overrides change a YAML file; change the mapping itself")
    return config if isinstance(config, RunConfig) else parse_config(dict(config))


def attach(base: LoadedBase, adapter: Mapping[str, Any] | None = None) -> AdapterTraining:
    """Attach an adapter to the base, read this rank's rows of it, and set up the optimizer.
    Collective; once for each ``load``.

    Args:
        base: of ``load``.
        adapter: section ``adapter`` of a configuration, such as ``{"kind": "lora", "r": 8}``;
            None: that of the configuration.

    Raises:
        UserError: on every rank: the adapter does not fit the base, unfit data, damaged files.
    """
    world = base.world
    with world.raise_together("attach the adapter"):
        resolved = base.resolved if adapter is None else replace_adapter(base.resolved, adapter)
        config = resolved.run
        if config.adapter.kind == "none":
            raise UserError("adapter.kind is none: nothing would be trained; choose lora")
        setup = build_model(resolved, packed_tokens=count_packed_tokens(config))
    loaders = read_run_inputs(config, setup, world, None)
    check_loaders_fit_model(loaders, setup.skeleton, setup.adapter.num_extra_positions)
    built, call = load_with_adapter(setup, world, base.device, loaders=loaders)
    check_document_isolation(built, config)
    training = AdapterTraining(config, world, built, call, loaders)
    training.plan_steps()
    training.untrained_logits  # noqa: B018 (computed here: it is that of the base only now)
    return training


def load_with_adapter(
    setup: ModelSetup,
    world: World,
    device: torch.device,
    trained_on: Sequence[BaseRequirement] = (),
    loaders: DataLoaders | None = None,
) -> tuple[LoadedModel, nn.Module]:
    """Shard the model, load its rows and set up the optimizer. Collective.

    Args:
        trained_on: bases of the checkpoints to resume, compared with this one.
        loaders: data from which adapters are initialized; None: a checkpoint has their values.

    Returns:
        The loaded model, and the module to call in training steps.

    Raises:
        UserError: on every rank: damaged files, or another base than that of a checkpoint.
    """
    built = load_weights(setup, world, device, trained_on)
    if loaders is not None:
        initialize_from_data(built, loaders, world)
    return built, built.setup_optimizer(make_optimizer_factory(setup.config.train, device))


def merge_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    checkpoint: str | None = None,
    into: MergeInto = "original",
    dtype: str = "bfloat16",
    keep_zeros: bool = False,
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportOutcome:
    """Write base + adapter as a Hugging Face directory, reload it and compare logits.

    Args:
        run_dir: a run of ``dist-peft train`` or of ``AdapterTraining.save``.
        out: new directory.
        checkpoint: a step, ``best`` or ``last``; None: the finished run's adapter.
        into: the base's files (``original``) or the base as training saw it (``decoded``).
        dtype: type of the merged weights.
        keep_zeros: block weights that are exactly 0 in the base stay 0.
        verify: options of the comparison; None: no comparison.
        trust_remote_code: allow model code of the base to run.
        overwrite: replace a model that is in ``out``.

    Raises:
        UserError: the run cannot be merged, or ``out`` cannot be written.
        VerificationError: the merged model is not the trained one.
    """
    with _open_run(run_dir, checkpoint, verify, trust_remote_code) as view:
        return merge_finished_run(
            view,
            Path(out),
            into=into,
            dtype=dtype,
            keep_zeros=keep_zeros,
            verify=verify,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )


def export_run(
    run_dir: str | Path,
    out: str | Path,
    format_name: str,
    options: Mapping[str, Any] | None = None,
    *,
    checkpoint: str | None = None,
    into: MergeInto = "original",
    verify: VerificationOptions | None = VERIFY,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportOutcome:
    """Write a run in a public format, load it with its library and compare logits.

    Args:
        format_name: one of ``dist-peft export --list``.
        options: of the format, such as ``{"bits": 4}``.
        run_dir, out, checkpoint, into, verify, trust_remote_code, overwrite: as of ``merge_run``.

    Raises:
        UserError: no such format, it cannot take this run, or ``out`` cannot be written.
        VerificationError: the written model is not the trained one.
    """
    if format_name not in FORMATS:
        raise UserError(f"no format {format_name!r}; one of {', '.join(FORMATS)}")
    with _open_run(run_dir, checkpoint, verify, trust_remote_code) as view:
        return export_finished_run(
            view,
            format_name,
            Path(out),
            options or {},
            into=into,
            verify=verify,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )


def _open_run(
    run_dir: str | Path, checkpoint: str | None, verify: VerificationOptions | None, trust: bool
) -> AbstractContextManager[Path]:
    return open_trained_run(
        Path(run_dir), checkpoint, with_probe=verify is not None, trust_remote_code=trust
    )
