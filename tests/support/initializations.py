"""Data-driven initializations: loaded models that have one, and slow references."""

import math
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.app.calibration_sums import BYTES_AT_ONCE
from dist_peft.app.data_initialization import initialize_from_data
from dist_peft.app.data_setup import DataLoaders, make_data_loaders
from dist_peft.app.model_setup import LoadedModel, build_model, load_weights
from dist_peft.app.resolved_config import resolve_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World

CPU = torch.device("cpu")


def initialize(
    world: World, tree: dict[str, Any], bytes_at_once: int = BYTES_AT_ONCE
) -> tuple[LoadedModel, DataLoaders]:
    """Load the model of a run and initialize its adapter, without training."""
    config = parse_config(tree)
    setup = build_model(resolve_config(config))
    loaders = make_data_loaders(config, setup.tokenizer, world)
    built = load_weights(setup, world, CPU)
    initialize_from_data(built, loaders, world, bytes_at_once)
    return built, loaders


def gather_starts(
    world: World, trees: list[dict[str, Any]], bytes_at_once: int = BYTES_AT_ONCE
) -> list[dict[str, Tensor]]:
    """The initialized adapter of each run, whole, on every rank."""
    return [initialize(world, tree, bytes_at_once)[0].gather_adapter() for tree in trees]


def list_lora_layers(built: LoadedModel) -> dict[str, LoraLinear]:
    return {n: m for n, m in built.model.named_modules() if isinstance(m, LoraLinear)}


def compute_paper_factors(gradient: Tensor, r: int, gamma: float) -> tuple[Tensor, Tensor]:
    """LoRA-GA's A0 and B0 by its paper's formulas, one number at a time."""
    out, features = gradient.shape
    U, _, V = torch.linalg.svd(gradient, full_matrices=False)
    c = out ** (1 / 4) / math.sqrt(gamma)
    A, B = torch.zeros(r, features), torch.zeros(out, r)
    for i in range(r):
        for j in range(features):
            A[i, j] = c * V[i, j]
        for o in range(out):
            B[o, i] = c * U[o, r + i]
    return A, B


def assert_same_factors(A: Tensor, B: Tensor, like: tuple[Tensor, Tensor], atol: float) -> None:
    """Equal but for the sign of each singular pair, of which A and B have different ones."""
    sign_a = (A * like[0]).sum(1, keepdim=True).sign()
    sign_b = (B * like[1]).sum(0).sign()
    torch.testing.assert_close(A, sign_a * like[0], rtol=0, atol=atol)
    torch.testing.assert_close(B, sign_b * like[1], rtol=0, atol=atol)
