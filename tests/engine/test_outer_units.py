"""Units outside of the blocks; what they do to memory and losses on real ranks."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from dist_peft.app.base_content import BaseRequirement
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.compress.base_origin import hash_unread_tensors
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.engine import outer_units
from dist_peft.engine.outer_units import list_outer_units
from dist_peft.engine.replicas import ReplicaCheck
from dist_peft.store.base_record import BaseRecord
from dist_peft.train.objective import TokenObjective
from dist_peft.train.optimizers import make_optimizer_factory
from tests.support.dist import run_ranks
from tests.support.tiny_engines import CPU, Model
from tests.support.tiny_models import OUTER, save_model
from tests.support.tiny_runs import save_words


def test_units_of_a_model() -> None:
    model = Model()
    embedding, head = list_outer_units(model)
    assert embedding.modules == (model.embedding,) and head.modules == (model.head,)
    assert embedding.parameters == [model.embedding.weight]
    assert embedding.num_bytes == 33 * 64 * 4
    model.head = nn.Linear(64, 33, bias=False, device="meta")
    model.head.weight = model.embedding.weight
    (tied,) = list_outer_units(model)
    assert tied.modules == (model.embedding, model.head)
    model.embedding.requires_grad_(True)
    assert list_outer_units(model) == []


def test_an_embedding_that_the_code_of_the_model_reads_stays_with_the_root() -> None:
    model = Model()
    vars(model.embedding)["parameter_readers"] = {"weight": None}
    (head,) = list_outer_units(model)
    assert head.modules == (model.head,)


def test_large_ones_are_units_of_their_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    marks = vars(model).setdefault("parameter_readers", {})
    marks["last"] = (model.blocks,)  # whatever module it is
    assert len(list_outer_units(model)) == 2
    monkeypatch.setattr(outer_units, "MIN_UNIT_BYTES", 64 * 4)
    assert len(list_outer_units(model)) == 3
    marks["last"] = ()  # never read
    assert len(list_outer_units(model)) == 2


@mock.patch.object(outer_units, "MIN_UNIT_BYTES", 1024)
def train_steps(world: World, base: str, kind: str) -> dict:
    """Losses of two steps of two micro-batches a rank of three, and what was whole when."""
    config = parse_config(
        {
            "base": {"path": base, "quant": {"kind": "nf4"}, "compute_dtype": "float32"},
            "adapter": {"kind": "lora", "r": 4},
            "data": {"train": ["unused.jsonl"]},
            "engine": {"kind": kind, "stage": 2} if world.size > 1 else {},
            "train": {"micro_batch": 1, "global_batch": 6, "device": "cpu", "precision": "fp32"},
        }
    )
    setup = build_model(ResolvedConfig(config, Path(base)))
    index = setup.skeleton.index
    towers = [n for n in index.tensors if "vision_tower.embeddings" in n]
    record = BaseRecord(base, tensors=hash_unread_tensors(index, towers, world))
    # a checkpoint of a version that loaded towers too
    built = load_weights(setup, world, CPU, [BaseRequirement("a checkpoint", record, "")])
    model, engine = built.model, built.engine
    inside = {id(p) for block in setup.skeleton.blocks for p in block.parameters()}
    watched = {n: p for n, p in model.named_parameters() if id(p) not in inside}
    whole: dict[str, set[str]] = {}

    def list_whole(when: str) -> None:
        found = {n for n, p in watched.items() if engine.get_local_bytes(p) is not None}
        found = {n for n in found if watched[n].untyped_storage().nbytes()}
        whole.setdefault(when, set()).update(found)

    for block in setup.skeleton.blocks:
        block.register_forward_hook(lambda *_: list_whole("block"))
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda *_: list_whole("head"))
    if world.size > 1:
        ReplicaCheck(model, engine, world).compare_replicas({}, everything=True)
    call = built.setup_optimizer(make_optimizer_factory(config.train, CPU))
    losses, received = [], engine.bytes_gathered
    for step in range(2):
        total = 0.0
        mine = range(6)[world.rank :: world.size]
        for number, index in enumerate(mine):
            ids = torch.arange(20)[None] * (7 + index + 6 * step) % 97
            labels = ids.roll(-1, 1)
            labels[:, -1] = -100
            places = torch.arange(20)[None]
            batch = Batch(ids, labels, places, torch.tensor([index]), is_packed=False)
            loss = TokenObjective().compute_loss(model, batch, CPU, call) / (6 * 19)
            total += loss.item()
            engine.backward(loss, last=number == len(mine) - 1)
        list_whole("between")
        losses.append(world.sum_over_ranks(total)[0])
        engine.step(1e-2, 1.0)
    return {
        "losses": losses,
        "whole": whole,
        "units": {n: p.nbytes for n, p in watched.items() if engine.get_local_bytes(p) is not None},
        "meta": {n for n, p in watched.items() if p.is_meta},
        "gathered": engine.bytes_gathered - received,
        "used": set(built.record.tensors),
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", sorted(OUTER))
def test_units_are_whole_in_their_readers_alone(name: str, tmp_path: Path) -> None:
    save_model(OUTER[name], tmp_path)
    save_words(tmp_path)
    expected = train_steps(World(), str(tmp_path), "single")["losses"]
    tied = "embed_tokens.weight"
    for kind in ("fsdp2", "zero") if name == "gemma3" else ("fsdp2",):
        for found in run_ranks(train_steps, 3, str(tmp_path), kind):
            assert found["losses"] == pytest.approx(expected, rel=1e-6)
            assert any(n.endswith(tied) for n in found["units"])
            # zero's root holds the last norm, which is small
            kept = {n for n in found["whole"]["block"] if kind == "fsdp2" or "norm" not in n}
            assert found["whole"]["between"] == kept == set()
            assert [n for n in found["whole"]["head"] if n.endswith(tied)]
            if name == "gemma3":
                assert len(found["meta"]) == 50 and all("language" not in n for n in found["meta"])
                assert not [n for n in found["used"] if "vision" in n or "projector" in n]
            else:
                assert len(found["units"]) == 5  # per-layer embeddings and projections
