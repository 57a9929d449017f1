"""Six model types of different kinds, as ``benchmarks/families.py`` tries all of them.

The rest of the types is run by that command alone; its table is docs/support.md.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from families import reference_model, try_type  # noqa: E402
from family_runs import try_runs  # noqa: E402

KINDS = {
    "deepseek_v3": "latent attention, a mixture of experts next to a shared one",
    "gemma3n_text": "per-layer embeddings, updates of alternating streams, windows",
    "gpt_oss": "experts stored transposed, biases, sinks",
    "nemotron_h": "Mamba 2 and attention, blocks of two classes",
    "qwen3_5_text": "gated delta rule and attention",
    "qwen3_vl_moe": "a mixture inside of a model with a tower",
}
PACKED = ("deepseek_v3", "gemma3n_text", "qwen3_vl_moe")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_packing(kind: str, tmp_path: Path) -> None:
    found = try_type(kind, tmp_path)
    assert found["outcome"] == "works", found
    assert found["logits_difference"] < 1e-5
    assert found["factors"] > 4 and not found["without_gradient"]
    assert found["packing"] == ("isolated" if kind in PACKED else "refused")


@pytest.mark.e2e
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.turn(i % 3, 3)) for i, k in enumerate(KINDS)]
)
def test_two_ranks_and_a_merge(kind: str, tmp_path: Path) -> None:
    reference_model(kind, tmp_path / "base")
    found = try_runs(tmp_path / "base", tmp_path / "runs", {})
    assert found["ranks"] < 2e-6, found
    assert found["merge"] < 2e-6, found
