"""Live tensor storage of a real run, to compare a plan with."""

import gc
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.world import World
from dist_peft.data.classification import LabelledBatch
from dist_peft.data.loader import Batch
from dist_peft.engine.fsdp2 import Fsdp2Engine
from dist_peft.engine.zero import ZeroEngine
from dist_peft.plan.storage_tracker import StorageTracker
from dist_peft.train.objective import ClassificationObjective, Objective, TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.predicted_inputs import ScheduledSampling
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import save_words

CPU = torch.device("cpu")

ODD = tf.LlamaConfig(
    hidden_size=120,
    intermediate_size=200,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    vocab_size=211,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""Four blocks; no size is a multiple of 64, and three ranks get uneven shares of some."""


def save_odd_base(directory: Path) -> Path:
    save_model(ODD, directory, dtype=torch.bfloat16)
    save_words(directory)
    return directory


ODD_BERT = tf.BertConfig(
    hidden_size=120,
    intermediate_size=200,
    num_hidden_layers=4,
    num_attention_heads=6,
    vocab_size=211,
    max_position_embeddings=128,
)


def save_odd_bert(directory: Path) -> Path:
    save_model(ODD_BERT, directory, dtype=torch.bfloat16, auto=tf.AutoModel)
    save_words(directory)
    return directory


def odd_tree(base: Path, /, **sections: Any) -> dict[str, Any]:
    """A run on ``base``: NF4, LoRA of rank 5 with dropout, two micro-batches a rank of three."""
    tree: dict[str, Any] = {
        "base": {"path": str(base), "quant": {"kind": "nf4", "group_size": 64}},
        "adapter": {"kind": "lora", "r": 5, "alpha": 10, "dropout": 0.1},
        "data": {"train": ["unused.jsonl"], "seq_len": 96, "packing": True},
        "train": {"micro_batch": 2, "global_batch": 12, "steps": 2, "device": "cpu", "samples": 0},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def odd_classifier_tree(base: Path, **sections: Any) -> dict[str, Any]:
    """The same run with three classes."""
    source = {"path": "unused.tsv", "format": "classification", "labels": ["a", "b", "c"]}
    tree = odd_tree(base, data={"packing": False, "train": [source]}, **sections)
    tree["base"]["head"] = "classifier"
    return tree


def measure_steps(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Load each tree and train two steps; the second is measured.

    Returns:
        Of this rank in bytes: ``rows``, its part of all parameters; ``resting``, storages of
        parameters, buffers and optimizer state after the first step; ``peak``, the largest live
        storage in the second step; ``gathered``, in one of its micro-batches.
    """
    return {name: _measure_run(world, parse_config(tree)) for name, tree in trees.items()}


def _measure_run(world: World, config: RunConfig) -> dict[str, int]:
    earlier = _list_all_tensors()  # of the run before, which DeepSpeed keeps
    setup = build_model(ResolvedConfig(config, Path(config.base.path)))
    built = load_weights(setup, world, CPU)
    rows = sum(_count_own_bytes(built, p) for p in built.model.parameters())
    call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    count = -(-config.train.global_batch // (config.train.micro_batch * world.size))
    _run_step(built, call, config, 1)  # FSDP2 pads shards at the first forward
    others = {id(tensor) for tensor in earlier}
    resting = [tensor for tensor in _list_resting(built) if id(tensor) not in others]
    tracker = StorageTracker()
    tracker.add_tensors(resting, "resting")
    before, size = built.engine.bytes_gathered, tracker.total
    del resting
    with tracker:
        _run_step(built, call, config, count)
    gathered = (built.engine.bytes_gathered - before) // count
    return {
        "rows": rows,
        "resting": size,
        "peak": tracker.peaks["start"].total,
        "gathered": gathered,
    }


def _count_own_bytes(built: LoadedModel, parameter: torch.nn.Parameter) -> int:
    own = built.engine.get_local_bytes(parameter)
    if own is None:
        own = getattr(parameter, "_local_tensor", parameter)
    return own.numel() * own.element_size()


def _make_labelled_batch(ids: Tensor, classes: int) -> LabelledBatch:
    """Sequences of which one is whole and one has a token of padding."""
    sequences, length = ids.shape
    mask = torch.ones(sequences, length, dtype=torch.long)
    mask[1, -1] = 0
    return LabelledBatch(
        ids,
        torch.ones(sequences, 1, dtype=torch.long),
        torch.arange(length).expand(sequences, -1),
        torch.arange(sequences),
        attention_mask=mask,
        token_types=torch.zeros_like(mask),
        ranges=torch.tensor([0, classes]).expand(sequences, -1),
    )


def _run_step(built: LoadedModel, call: torch.nn.Module, config: RunConfig, count: int) -> None:
    length, sequences = config.data.seq_len, config.train.micro_batch
    half = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])
    for number in range(count):
        # different tokens, as a plan counts rows of the embedding
        table = built.model.get_input_embeddings()  # type: ignore[operator]
        ids = (torch.arange(sequences * length) % table.num_embeddings).view(sequences, length)
        labels = ids.clone()
        labels[:, -1] = -100
        places = half.expand(sequences, -1).contiguous()
        batch = Batch(ids, labels, places, torch.arange(sequences), is_packed=config.data.packing)
        objective: Objective[Any] = TokenObjective()
        if built.setup.skeleton.head is not None:
            objective = ClassificationObjective()
            batch = _make_labelled_batch(ids, len(built.setup.skeleton.head.labels))
        built.setup.adapter.begin_micro_batch(0, batch.sample_ids)
        if (section := config.train.scheduled_sampling) is not None:
            sampling = ScheduledSampling(section, config.train.seed)
            sampling.begin_step(0)
            batch = sampling.mix_inputs(built.model, TokenObjective(), batch, CPU)
        loss = objective.compute_loss(built.model, batch, CPU, call)
        built.engine.backward(loss / 100, last=number == count - 1)
    built.engine.step(1e-3, 1.0)


def _list_resting(built: LoadedModel) -> list[Any]:
    """Parameters, buffers and optimizer state; with DeepSpeed, which has many places: all tensors
    of this process."""
    if isinstance(built.engine, ZeroEngine):
        return _list_all_tensors()
    tensors: list[Any] = [*built.model.parameters(), *built.model.buffers()]
    engine: Any = built.engine
    if isinstance(engine, Fsdp2Engine):
        tensors += engine.outer.resting_tensors
    for state in engine.optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def _list_all_tensors() -> list[Any]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
