"""The file against llama.cpp's own rules: names, order of rows, scaling."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.export.formats.gguf_lora import write_gguf_lora
from dist_peft.export.formats.gguf_model import GgufModelLayout
from dist_peft.export.formats.plain_lora import LinearFactors, read_plain_lora
from dist_peft.export.formats.registry import FORMATS, export_model
from dist_peft.model.skeleton import build_skeleton
from tests.support.export_runs import FakeRun, make_run

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("run"), QuantConfig())


def read_changes(file: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each tensor of the base: ``alpha / r * B A``, or ``B A``."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    changes = {}
    for name in [n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")]:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        changes[name] = (alpha / len(A) if alpha else 1.0) * (B @ A)
    return changes


def permute(rows: Tensor, heads: int) -> Tensor:
    """``LlamaModel.permute`` of llama.cpp's converter."""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def assert_same_changes(file: Path, factors: dict[str, LinearFactors]) -> None:
    found = read_changes(file)
    assert len(found) == len(factors)
    for path, one in factors.items():
        _, _, layer, own = path.split(".", 3)
        name = NAMES[own]
        want = one.scaling * (one.B @ one.A)
        if name in HEADS:
            want = permute(want, HEADS[name])
        got = found[f"blk.{layer}.{name}.weight"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_file_holds_the_change_of_each_linear(run: FakeRun, tmp_path: Path) -> None:
    result = export_model("gguf-lora", run.job(tmp_path / "out"))
    fields = gguf.GGUFReader(result.path).fields
    read = {key: fields[key].contents() for key in ("general.type", "adapter.type")}
    assert read == {"general.type": "adapter", "adapter.type": "lora"}
    assert fields["general.architecture"].contents() == "llama"
    assert fields["adapter.lora.alpha"].contents() == 8.0
    factors = dict(read_plain_lora(run.adapter_dir, "x"))
    assert len(factors) == 14
    assert_same_changes(result.path, factors)


def test_several_ranks_and_scalings(run: FakeRun, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)

    def make(path: str, r: int, scaling: float) -> tuple[str, LinearFactors]:
        A, B = (torch.randn(s, generator=generator) for s in ((r, 64), (64, r)))
        return f"model.layers.{path}", LinearFactors(A, B, scaling)

    layout = GgufModelLayout(build_skeleton(run.base, run.directory))
    for scalings, alpha in (((2.0, 1.0), 4.0), ((2.0, 3.0), 0.0)):
        factors = dict(
            [
                make("0.self_attn.q_proj", 2, scalings[0]),
                make("1.self_attn.o_proj", 4, scalings[1]),
            ]
        )
        write_gguf_lora(tmp_path / "x.gguf", layout, factors, "base")
        found = gguf.GGUFReader(tmp_path / "x.gguf").fields["adapter.lora.alpha"].contents()
        assert found == alpha
        assert_same_changes(tmp_path / "x.gguf", factors)


def test_linears_that_llama_cpp_does_not_know(run: FakeRun, tmp_path: Path) -> None:
    layout: Any = GgufModelLayout(build_skeleton(run.base, run.directory))
    one = LinearFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(UserError, match=r"no tensor of its own for model\.unknown"):
        write_gguf_lora(tmp_path / "x.gguf", layout, {"model.unknown": one}, "base")
    layout.tied = True
    with pytest.raises(UserError, match="no tensor of its own for lm_head"):
        write_gguf_lora(tmp_path / "x.gguf", layout, {"lm_head": one}, "base")
    assert "gguf-lora" in FORMATS and not list(tmp_path.iterdir())
