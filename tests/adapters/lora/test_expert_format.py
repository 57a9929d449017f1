"""Names of experts' tensors in PEFT's files, and the shapes of a merge."""

import pytest
import torch

from dist_peft.adapters.lora.combination import CombineRecipe, combine_adapters
from dist_peft.adapters.lora.expert_format import (
    is_taken_for_experts,
    list_target_parameters,
    split_expert_factors,
    to_expert_stack_path,
    to_public_expert_path,
)
from dist_peft.adapters.lora.merge import LoraMerger, sum_group_change
from dist_peft.adapters.lora.tensors import parse_lora_tensors
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span

MLP = "model.layers.3.mlp"
UP, DOWN = f"{MLP}.experts.gate_up_proj", f"{MLP}.experts.down_proj"


@pytest.mark.parametrize("adapted", [(UP, DOWN), (UP,), (DOWN,)])
@pytest.mark.parametrize("bare", [False, True])
def test_names_come_back(adapted: tuple[str, ...], bare: bool) -> None:
    targets = [path.rpartition("." if bare else "mlp.")[2] for path in adapted]
    paths = [to_public_expert_path(path, adapted) for path in adapted]
    assert len(set(paths)) == len(paths)
    assert [to_expert_stack_path(path, targets) for path in paths] == list(adapted)
    for linear in ("self_attn.q_proj", "mlp.shared_expert.down_proj", "mlp.down_proj"):
        assert to_expert_stack_path(f"model.layers.3.{linear}", targets) is None


def test_target_parameters_are_short_and_exact() -> None:
    layers = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)]
    assert list_target_parameters(layers, [*layers, UP]) == ["experts.down_proj"]
    assert list_target_parameters(layers[:1], layers) == layers[:1]
    dense, shared = f"{MLP}.down_proj.weight", f"{MLP}.shared_expert.down_proj.weight"
    found = list_target_parameters([dense, shared], [dense, shared, DOWN])
    assert found == ["mlp.down_proj.weight", "shared_expert.down_proj.weight"]
    assert is_taken_for_experts(f"{MLP}.up_proj") and not is_taken_for_experts(
        f"{MLP}.gate_up_proj"
    )


E2, R, OUT, IN = 5, 2, 6, 4


def public(**config: object) -> PublicAdapter:
    torch.manual_seed(0)
    A, B = torch.randn(E2 * R, IN), torch.randn(OUT, R * E2)
    prefix = f"base_model.model.{MLP}.experts"
    return PublicAdapter(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_parameters": ["experts.down_proj"]}
        | {"rank_pattern": {"down_proj": R}, "target_modules": []}
        | config,
        {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B},
    )


def test_each_expert_gets_its_own_change() -> None:
    """In chunks of any rows; PEFT's formula for all experts at once is the reference."""
    adapter = public()
    A, B = adapter.tensors.values()
    expected = torch.einsum("ore,eri->eoi", B.view(OUT, R, E2), A.view(E2, R, IN)) / R
    found = parse_lora_tensors(adapter)[DOWN]
    assert (found.shape, found.experts) == ((E2 * OUT, IN), E2)
    assert split_expert_factors(A, B, R)[1].shape == (E2 * OUT, R)
    for size in (30, 7, 1):
        merger = LoraMerger(parse_lora_tensors(adapter), None, {})
        name = f"{DOWN}.weight"
        rows = [
            merger.compute_delta_rows(name, span)
            for span in Span(0, E2 * OUT).split_into_chunks(size)
        ]
        torch.testing.assert_close(torch.cat(rows).view(E2, OUT, IN), expected)


def test_has_no_place_in_zeros_and_is_not_combined() -> None:
    """Experts of one A repeated within groups do not make it QA-LoRA's."""
    module = parse_lora_tensors(public())[DOWN]
    assert sum_group_change(module, 1, Span(0, OUT)) is None
    with pytest.raises(UserError, match=r"a adapts experts \(.*down_proj\), and such adapters"):
        combine_adapters({"a": public(), "b": public()}, [1.0, 1.0], CombineRecipe("linear"))


def test_refuses_shapes_that_are_no_experts() -> None:
    with pytest.raises(UserError, match="no whole experts of rank 3"):
        parse_lora_tensors(public(rank_pattern={"experts.down_proj": 3}))
    damaged = public()
    del damaged.tensors[f"base_model.model.{MLP}.experts.lora_B.weight"]
    with pytest.raises(UserError, match="are not one lora_A and one lora_B"):
        parse_lora_tensors(damaged)
