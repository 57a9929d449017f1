"""Set up a run's model: files -> skeleton -> adapter -> shards -> loaded weights."""

import copy
import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_peft.adapters.classifier_head.method import HeadedAdapter
from dist_peft.adapters.joined.method import JoinedAdapter
from dist_peft.adapters.method_table import assemble_adapter, assemble_joined
from dist_peft.adapters.protocol import Adapter, TrainsBaseWeights
from dist_peft.adapters.tensor_checks import check_tensor_values
from dist_peft.app.base_content import BaseRequirement, gather_tensor_hashes, read_fusion_bases
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.compress.base_origin import hash_unread_tensors
from dist_peft.core.config.run import FusionConfig, RunConfig
from dist_peft.core.config.sweep_points import split_sweep_configs
from dist_peft.core.host_memory import return_freed_memory
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.chat_override import override_chat_template
from dist_peft.data.labels import list_class_names
from dist_peft.engine import Engine, make_engine
from dist_peft.engine.activation_checkpointing import checkpoint_configured_blocks
from dist_peft.engine.block_beats import mark_block_progress
from dist_peft.engine.engine_protocol import OptimizerFactory, local_parameters
from dist_peft.engine.liger_kernels import apply_liger_kernels
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.classifier import set_pad_token
from dist_peft.model.config_sizes import refuse_foreign_tokenizer
from dist_peft.model.freezing import compute_packed_share
from dist_peft.model.hub import Tokenizer, load_tokenizer
from dist_peft.model.isolation_probe import refuse_leaks
from dist_peft.model.layer_decay import LayerDecay
from dist_peft.model.load import load_model
from dist_peft.model.panel_encoding import count_load_threads
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.reader import RowReader
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.importance import EngineParameters, ImportanceFactory

__all__ = [
    "LoadedModel",
    "ModelSetup",
    "build_model",
    "list_adapter_parameters",
    "load_init_factors",
    "load_training_state",
    "load_weights",
    "replace_labels",
]

log = logging.getLogger("dist_peft")


@dataclass
class ModelSetup:
    """Rank-local setup (no collectives): files located, model on meta, adapter attached."""

    config: RunConfig
    """Configuration of the run (of the first task, where there are several)."""
    directory: Path
    tokenizer: Tokenizer
    skeleton: Skeleton
    adapter: Adapter
    base_id: str
    """Fingerprint of the base's files, quantization and compute type, and the head's labels."""
    fused: list[BaseRequirement]
    """Bases of a fusion's adapters, which have to be this base."""

    @property
    def model(self) -> nn.Module:
        return self.skeleton.model


@dataclass
class LoadedModel:
    """A loaded, sharded model."""

    setup: ModelSetup
    engine: Engine
    bytes_read: int
    stored_bytes: int
    """Bytes of all parameters as stored, summed over the ranks that shard one copy."""
    trained: int
    """Number of trainable parameters."""
    adapter_names: tuple[str, ...]
    """Names of the adapter's parameters, frozen initialization factors included. An engine may hide
    the base's parameters from ``named_parameters`` during training; attributes stay."""
    record: BaseRecord
    """Record of the base with the hashes of all its tensors."""

    @property
    def model(self) -> nn.Module:
        return self.setup.model

    def get_parameter(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def setup_optimizer(self, factory: OptimizerFactory) -> nn.Module:
        """Set up the optimizer of the trainable parameters and return the module to call."""
        adapter, train = self.setup.adapter, self.setup.config.train
        lr_scale = adapter.get_lr_scale
        if (rule := adapter.get_importance_rule()) is not None:
            factory = ImportanceFactory(factory, rule)
        if train.layer_decay != 1:
            lr_scale = LayerDecay(
                self.model, self.setup.skeleton.blocks, train.layer_decay, lr_scale
            )
        if isinstance(adapter, TrainsBaseWeights):
            return self.engine.setup_optimizer(
                self.model, factory, lr_scale, adapter.get_trainable_steps
            )
        return self.engine.setup_optimizer(self.model, factory, lr_scale)

    def gather_adapter(self, keep: bool = True) -> dict[str, Tensor]:
        """Gather every adapter parameter, one after the other; a collective.

        Args:
            keep: whether this rank wants them. One that writes nothing need not hold them all.

        Returns:
            Unsharded parameters on the CPU, by full name; none where they are not kept.
        """
        whole: dict[str, Tensor] = {}
        for name in self.adapter_names:
            value = self.engine.gather_parameter(self.get_parameter(name))
            if keep:
                whole[name] = value
        return whole


def build_model(resolved: ResolvedConfig, *, packed_tokens: int = 0) -> ModelSetup:
    """Build the model on meta and attach the adapter.

    Args:
        packed_tokens: length of packed sequences of several documents; 0 without packing.

    Raises:
        UserError: unusable base files, model type or adapter targets; packed documents attend to
            each other.
    """
    config, directory = resolved.run, resolved.directory
    skeleton = build_skeleton(config.base, directory, list_class_names(config.data))
    if config.base.quant is not None:
        log.info(
            "%.1f %% of the model's bytes are packed", 100 * compute_packed_share(skeleton.model)
        )
    if packed_tokens:
        refuse_leaks(skeleton.model, skeleton.blocks, packed_tokens)
    tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
    tokenizer = override_chat_template(tokenizer, config.data.chat_template)
    refuse_foreign_tokenizer(tokenizer, skeleton.vocabulary_size, directory)
    adapter: Adapter
    if config.sweep is None:
        adapter = assemble_adapter(config, skeleton)
    else:
        adapter = assemble_joined(list(split_sweep_configs(config).values()), skeleton)
    if skeleton.head is not None:
        set_pad_token(skeleton.model, tokenizer)
    adapter.attach_to_model(skeleton.model)
    fused: list[BaseRequirement] = []
    if isinstance(config.adapter, FusionConfig):
        quant = config.base.quant
        fused = read_fusion_bases(config.adapter, config.base.path, skeleton, quant)
    base_id = _compute_base_id(config, skeleton)
    return ModelSetup(config, directory, tokenizer, skeleton, adapter, base_id, fused)


def _compute_base_id(config: RunConfig, skeleton: Skeleton) -> str:
    stored = config.base.model_dump(include={"quant", "compute_dtype"}, mode="json")
    if config.base.quant is not None and not config.base.quant.embeddings:
        del stored["quant"]["embeddings"]  # the fingerprint of earlier runs
    text = skeleton.index.compute_fingerprint() + json.dumps(stored, sort_keys=True)
    text += "" if skeleton.prequantized is None else skeleton.prequantized.format_label
    text += "" if skeleton.head is None else json.dumps(skeleton.head.labels)
    return hashlib.sha256(text.encode()).hexdigest()


def replace_labels(built: LoadedModel, labels: Sequence[str]) -> LoadedModel:
    """Return the same loaded model with its classes renamed to ``labels``, one per class.

    A language model, which has no classes, is returned unchanged.
    """
    head, adapter = built.setup.skeleton.head, copy.copy(built.setup.adapter)
    if head is None:
        return built
    assert len(labels) == len(head.labels) and isinstance(adapter, HeadedAdapter)
    head = adapter.head = replace(head, labels=tuple(labels))
    skeleton = replace(built.setup.skeleton, head=head)
    base_id = _compute_base_id(built.setup.config, skeleton)
    setup = replace(built.setup, adapter=adapter, skeleton=skeleton, base_id=base_id)
    return replace(built, setup=setup)


def load_weights(
    setup: ModelSetup,
    world: World,
    device: torch.device,
    trained_on: Sequence[BaseRequirement] = (),
) -> LoadedModel:
    """Shard the model and load its weights; every rank reads its own rows only.

    Args:
        trained_on: bases of the checkpoints to resume, compared with this one.

    Raises:
        UserError: on every rank: damaged files on any rank, different files on different ranks,
            or one of ``trained_on`` is another base.
    """
    config, model, skeleton = setup.config, setup.model, setup.skeleton
    engine = make_engine(config.engine, config.train, world, device)
    if config.engine.kernels == "liger":
        apply_liger_kernels(model, skeleton.blocks)
    adapter = setup.adapter
    shares = adapter.shares.make_contexts if isinstance(adapter, JoinedAdapter) else None
    checkpoint_configured_blocks(skeleton.blocks, config.engine, device, shares)
    mark_block_progress(skeleton.blocks)
    engine.shard_model(model, skeleton.blocks)
    hashes = build_row_hashes(skeleton)
    with RowReader(skeleton.index, hashes) as reader:
        with world.raise_together("load base", is_slow=True), return_freed_memory():
            threads = count_load_threads(world.local_size, device)
            load_model(model, reader, engine, device, threads=threads)
        if (packed := skeleton.prequantized) and (note := packed.describe_scale_rounding()):
            log.warning("%s", note, extra=ONCE)
        log.info("loaded %s: this rank read %.1f MiB", setup.directory, reader.bytes_read / 2**20)
        record = replace(
            BaseRecord.from_index(setup.config.base.path, skeleton.index),
            tensors=gather_tensor_hashes(hashes, skeleton, engine, world),
        )
        users = (*setup.fused, *trained_on)
        recorded = {name for user in users for name in user.record.tensors}
        # earlier versions loaded, and recorded, tensors that the model does not read
        unread = (recorded - record.tensors.keys()) & skeleton.index.tensors.keys()
        found = dict(record.tensors)
        if unread:
            found |= hash_unread_tensors(skeleton.index, unread, world)
        for user in users:
            user.check_tensor_hashes(found, str(setup.directory))
        parameters = dict(model.named_parameters())
        return LoadedModel(
            setup,
            engine,
            bytes_read=reader.bytes_read,
            stored_bytes=sum(
                p.numel() * p.element_size() for p in parameters.values() if not p.is_meta
            ),
            trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
            adapter_names=list_adapter_parameters(model),
            record=record,
        )


def list_adapter_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the full names of the adapter's parameters, initialization factors included."""
    owners = {n for n, m in model.named_modules() if isinstance(m, AdapterModule)}
    return tuple(n for n, _ in model.named_parameters() if n.rpartition(".")[0] in owners)


def load_init_factors(setup: ModelSetup, checkpoints: CheckpointManager, path: Path) -> None:
    """Load the initialization factors (PiSSA, LoftQ) of a checkpoint; call before ``load``.

    The base is quantized as the residual of these factors, so they have to come first.
    """
    names = setup.adapter.list_init_factors()
    whole = checkpoints.read_whole_tensors(path, [f"start/{name}" for name in names])
    setup.adapter.set_init_factors({name: whole[f"start/{name}"] for name in names})


def load_training_state(
    built: LoadedModel,
    checkpoints: CheckpointManager,
    path: Path,
    step: int,
    skipped: Collection[int] = (),
) -> None:
    """Load adapters and optimizer moments of a checkpoint; call after ``setup_optimizer``.

    Raises:
        UserError: on every rank: files or tensors do not fit, or values are not finite.
    """
    state = built.engine.training_state_dict(built.model)
    checkpoints.load_checkpoint(path, state)
    with checkpoints.world.raise_together("check the checkpoint's values"):
        for name, value in state.items():  # one by one: copies of all of them may not fit
            check_tensor_values(local_parameters({name: value}), path)
    built.engine.load_training_state_dict(built.model, state, step, skipped)
    built.setup.adapter.finish_load(EngineParameters(built.model, built.engine))
