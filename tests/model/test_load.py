"""Who reads which bytes, and what becomes of them: one process, two and three."""

import errno
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig, LoraConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.core.world import RemoteError, World
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader
from tests.support import rank_loads
from tests.support.dist import run_ranks
from tests.support.rank_loads import CPU, load, share
from tests.support.tiny_models import CONFIGS, save_model

NF4, INT3 = QuantConfig(), QuantConfig(kind="int", bits=3, group_size=32)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(CONFIGS["llama"], tmp_path)
    return tmp_path


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "quant"), [(1, NF4), (2, INT3), (3, NF4), (3, INT3)])
def test_each_rank_reads_and_keeps_its_own_rows(
    ranks: int, quant: QuantConfig, llama: Path
) -> None:
    """Every byte of the files is read by one rank; together they pack what one process packs."""
    whole = load(World(), llama, quant)
    parts = run_ranks(load, ranks, llama, quant)
    for rank, part in enumerate(parts):
        assert part.bytes_read == sum(share(llama, ranks, rank))
        assert part.largest_read == max(share(llama, ranks, rank))
        assert part.progress == list(range(1, len(whole.local) + 1))
    tensors = load_file(llama / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(part.bytes_read for part in parts) == size
    assert len(whole.packed) == 2 * 7 + 1
    for name, value in whole.local.items():
        assert value.dtype == (torch.uint8 if name in whole.packed else torch.float32)
        assert torch.equal(torch.cat([part.local[name] for part in parts]), value), name


def test_tied_weight_is_read_once(tmp_path: Path) -> None:
    save_model(CONFIGS["qwen3"], tmp_path)
    loaded = load(World(), tmp_path, None)
    assert loaded.bytes_read == sum(share(tmp_path, 1, 0))


def damage(directory: Path, name: str) -> None:
    """NaN in the last row, which the last rank keeps."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name][-1, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _error(world: World, directory: Path, lora: LoraConfig | None) -> str:
    with pytest.raises(UserError) as caught:
        load(world, directory, NF4, lora)
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize(
    "lora", [None, LoraConfig(r=2, init="pissa")], ids=["bare", "start with collectives"]
)
def test_a_damaged_row_of_one_rank_is_every_ranks_error(
    lora: LoraConfig | None, llama: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    damage(llama, name)
    first, second = run_ranks(_error, 2, llama, lora)
    assert first == second
    assert first.startswith(f"tensor {name}: weight is not finite")


class UnreadableReader(RowReader):
    """Fails at one tensor on rank 1, as a bad sector or a lost mount does."""

    fails_at = ""

    def read_rows(self, name: str, span: Span | None = None) -> Tensor:
        if name == self.fails_at:
            raise OSError(errno.EIO, "Input/output error", name)
        return super().read_rows(name, span)


def _disk_errors(world: World, directory: Path, names: list[str], lora: LoraConfig) -> list[str]:
    texts = []
    for name in names:
        UnreadableReader.fails_at = name if world.rank == 1 else ""
        with (
            mock.patch.object(rank_loads, "RowReader", UnreadableReader),
            pytest.raises((OSError, RemoteError)) as caught,
        ):
            load(world, directory, NF4, lora)
        texts.append(str(caught.value))
    return texts


@pytest.mark.dist
def test_disk_error_of_one_rank_among_collectives_reaches_all(llama: Path) -> None:
    """Before, among and after the collectives; a rank left waiting would report a time-out."""
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    lora = LoraConfig(r=2, init="pissa", target_modules=["up_proj", "q_proj"])
    first, second = run_ranks(_disk_errors, 2, llama, names, lora)
    for name, healthy, failing in zip(names, first, second, strict=True):
        assert healthy == f"rank 1 failed in phase 'load base': {failing}"
        assert "Input/output error" in failing and name in failing


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_nan_outside_the_blocks_is_named(name: str, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors[name].view(-1)[-5] = float("nan")
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert _error(World(), llama, None).startswith(f"tensor {name}: weight is not finite")


def test_value_beyond_float16_is_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    skeleton = build_skeleton(BaseConfig(path=str(llama), compute_dtype="float16"), llama)
    with (
        RowReader(skeleton.index) as reader,
        pytest.raises(UserError, match=r"model\.norm\.weight.*range of torch\.float16"),
    ):
        load_model(skeleton.model, reader, SingleEngine(CPU), CPU)


class Forgetful(SingleEngine):
    """Takes the rows of one parameter and forgets them."""

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        if getattr(owner, "source", "") != "model.layers.1.mlp.down_proj.weight":
            super().fill_local_rows(owner, name, rows)


def test_nothing_is_left_unfilled(llama: Path) -> None:
    skeleton = build_skeleton(BaseConfig(path=str(llama), compute_dtype="float32"), llama)
    with (
        RowReader(skeleton.index) as reader,
        pytest.raises(AssertionError, match="never filled") as e,
    ):
        load_model(skeleton.model, reader, Forgetful(CPU), CPU)
    assert "model.layers.1.mlp.down_proj.packed" in str(e.value)
