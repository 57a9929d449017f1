"""Set up a run's model: files -> skeleton -> adapter -> shards -> loaded weights."""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_peft.adapters.classifier_head.method import HeadedAdapter, with_head
from dist_peft.adapters.protocol import Adapter, TrainsBase
from dist_peft.adapters.registry import make_adapter
from dist_peft.adapters.tensor_checks import check_tensor_values
from dist_peft.app.base_content import TrainedOn, fused_bases, hashes_over_ranks
from dist_peft.core.config.run import FusionConfig, RunConfig
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import freed_memory_is_returned
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.data.labels import class_names
from dist_peft.engine import Engine, make_engine
from dist_peft.engine.activation_checkpointing import checkpoint_blocks
from dist_peft.engine.protocol import OptimizerFactory, own_parameters
from dist_peft.model.base_hashes import row_hashes
from dist_peft.model.classifier import take_pad_token
from dist_peft.model.freezing import packed_share
from dist_peft.model.hub import Tokenizer, announce_trust, load_tokenizer, resolve_base
from dist_peft.model.isolation_probe import refuse_leaks
from dist_peft.model.load import AdapterRows, load_model
from dist_peft.model.skeleton import Skeleton, build_skeleton, torch_dtype
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.reader import RowReader
from dist_peft.train.checkpoint import Checkpoints

__all__ = ["Built", "Prepared", "give_start", "load", "prepare", "restore", "with_labels"]

log = logging.getLogger("dist_peft")


@dataclass
class Prepared:
    """Rank-local setup (no collectives): files located, model on meta, adapter attached."""

    config: RunConfig
    """Configuration of the run; ``base.quant`` of a prequantized base is read from its files."""
    directory: Path
    tokenizer: Tokenizer
    skeleton: Skeleton
    adapter: Adapter
    base_id: str
    """Fingerprint of the base's files, quantization and compute type, and the head's labels."""
    fused: list[TrainedOn]
    """Bases of a fusion's adapters, which have to be this base."""

    @property
    def model(self) -> nn.Module:
        return self.skeleton.model


@dataclass
class Built(Prepared):
    """A loaded, sharded model."""

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

    def parameter(self, name: str) -> nn.Parameter:
        found: nn.Parameter = attrgetter(name)(self.model)
        return found

    def optimize(self, factory: OptimizerFactory) -> nn.Module:
        """Set up the optimizer of the trainable parameters and return the module to call."""
        adapter = self.adapter
        if isinstance(adapter, TrainsBase):
            return self.engine.optimize(self.model, factory, adapter.lr_scale, adapter.first_step)
        return self.engine.optimize(self.model, factory, adapter.lr_scale)

    def gather_adapter(self) -> dict[str, Tensor]:
        """Return every adapter parameter, unsharded, on the CPU of each rank."""
        return {n: self.engine.gather(self.parameter(n)) for n in self.adapter_names}


def prepare(
    config: RunConfig, world: World, *, solving: bool = False, packed_tokens: int = 0
) -> Prepared:
    """Locate the base, build the model on meta and attach the adapter.

    Args:
        solving: accept an unquantized base although ``base.quant.solver`` is gptq.
        packed_tokens: length of packed sequences of several documents; 0 without packing.

    Raises:
        UserError: unusable base files, model type or adapter targets; packed documents attend to
            each other.
    """
    announce_trust(config.base)
    directory = resolve_base(config.base)
    skeleton = build_skeleton(config.base, directory, class_names(config.data))
    found = skeleton.prequantized
    quant = config.base.quant
    if quant is not None or found is not None:
        log.info("%.1f %% of the model's bytes are packed", 100 * packed_share(skeleton.model))
    if found is None and quant is not None and quant.solver == "gptq" and not solving:
        raise UserError(
            f"base.quant.solver is gptq, and base.path {config.base.path} is not quantized: give "
            "the directory that dist-peft quantize wrote, or the base/ of a run"
        )
    if found is not None:
        base = config.base.model_copy(update={"quant": found.quant})
        config = config.model_copy(update={"base": base})
    if packed_tokens:
        refuse_leaks(skeleton.model, skeleton.blocks, packed_tokens)
    tokenizer = load_tokenizer(directory, config.base.trust_remote_code)
    compute = torch_dtype(config.base.compute_dtype)
    arithmetic = compute if config.train.precision == "bf16" else torch.float32
    adapter = make_adapter(config.adapter, seed=config.train.seed, arithmetic=arithmetic)
    if skeleton.head is not None:
        seed = config.train.seed
        adapter = with_head(adapter, skeleton.head, seed=seed, arithmetic=arithmetic)
        take_pad_token(skeleton.model, tokenizer)
    adapter.attach(skeleton.model)
    fused: list[TrainedOn] = []
    if isinstance(config.adapter, FusionConfig):
        fused = fused_bases(config.adapter, config.base.path, skeleton)
    base_id = _base_id(config, skeleton)
    return Prepared(config, directory, tokenizer, skeleton, adapter, base_id, fused)


def _base_id(config: RunConfig, skeleton: Skeleton) -> str:
    stored = config.base.model_dump(include={"quant", "compute_dtype"}, mode="json")
    text = skeleton.index.fingerprint() + json.dumps(stored, sort_keys=True)
    text += "" if skeleton.prequantized is None else skeleton.prequantized.label
    text += "" if skeleton.head is None else json.dumps(skeleton.head.labels)
    return hashlib.sha256(text.encode()).hexdigest()


def with_labels(built: Built, labels: Sequence[str]) -> Built:
    """Return the same loaded model with its classes renamed to ``labels``, one per class.

    A language model, which has no classes, is returned unchanged.
    """
    head, adapter = built.skeleton.head, copy.copy(built.adapter)
    if head is None:
        return built
    assert len(labels) == len(head.labels) and isinstance(adapter, HeadedAdapter)
    head = adapter.head = replace(head, labels=tuple(labels))
    skeleton = replace(built.skeleton, head=head)
    base_id = _base_id(built.config, skeleton)
    return replace(built, adapter=adapter, skeleton=skeleton, base_id=base_id)


def load(
    prepared: Prepared,
    config: RunConfig,
    world: World,
    device: torch.device,
    trained_on: Sequence[TrainedOn] = (),
) -> Built:
    """Shard the model and load its weights; every rank reads its own rows only.

    Args:
        trained_on: bases of the checkpoints to resume, compared with this one.

    Raises:
        UserError: on every rank: damaged files on any rank, different files on different ranks,
            or one of ``trained_on`` is another base.
    """
    engine = make_engine(config.engine, config.train, world, device)
    model = prepared.model
    if config.engine.activation_checkpointing:
        checkpoint_blocks(prepared.skeleton.blocks)
    engine.shard(model, prepared.skeleton.blocks)
    hashes = row_hashes(prepared.skeleton)
    with RowReader(prepared.skeleton.index, hashes) as reader:
        with world.together("load base"), freed_memory_is_returned():
            load_model(model, reader, engine, device)
        if (packed := prepared.skeleton.prequantized) and (note := packed.rounding_note()):
            log.warning("%s", note, extra=ONCE)
        log.info(
            "loaded %s: this rank read %.1f MiB", prepared.directory, reader.bytes_read / 2**20
        )
        record = replace(
            BaseRecord.of_files(prepared.config.base.path, prepared.skeleton.index),
            tensors=hashes_over_ranks(hashes, prepared.skeleton, engine, world),
        )
        for user in (*prepared.fused, *trained_on):
            user.check_tensors(record.tensors, str(prepared.directory))
        fields = {name: getattr(prepared, name) for name in Prepared.__dataclass_fields__}
        parameters = dict(model.named_parameters())
        owners = {n for n, m in model.named_modules() if isinstance(m, AdapterRows)}
        return Built(
            **fields,
            engine=engine,
            bytes_read=reader.bytes_read,
            stored_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
            trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
            adapter_names=tuple(n for n in parameters if n.rpartition(".")[0] in owners),
            record=record,
        )


def give_start(prepared: Prepared, checkpoints: Checkpoints, path: Path) -> None:
    """Load the initialization factors (PiSSA, LoftQ) of a checkpoint; call before ``load``.

    The base is quantized as the residual of these factors, so they have to come first.
    """
    names = prepared.adapter.start_state()
    whole = checkpoints.read_whole(path, [f"start/{name}" for name in names])
    prepared.adapter.start_from({name: whole[f"start/{name}"] for name in names})


def restore(built: Built, checkpoints: Checkpoints, path: Path, step: int) -> None:
    """Load adapters and optimizer moments of a checkpoint; call after ``optimize``.

    Raises:
        UserError: on every rank: files or tensors do not fit, or values are not finite.
    """
    state = built.engine.state(built.model)
    checkpoints.load(path, state)
    with checkpoints.world.together("check the checkpoint's values"):
        for name, value in state.items():  # one by one: copies of all of them may not fit
            check_tensor_values(own_parameters({name: value}), path)
    built.engine.load_state(built.model, state, step)
