"""A base that is pruned in a moment, and slow references from the papers' definitions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_peft.app.pruning import PruningOptions, prune_base
from dist_peft.compress.calibration import CalibrationSize
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from dist_peft.quant.sparsity import Sparsity
from tests.support.tiny_runs import save_records, tiny_tree

CALIBRATION = CalibrationSize(3, 24, "--calibration-")  # on 2 ranks one of them has one more


def make_pruning_tree(directory: Path) -> dict[str, Any]:
    """A configuration whose files exist under ``directory``."""
    made = tiny_tree(directory, data__seq_len=32)
    save_records(directory / "train.jsonl", 30, 10)
    return made


def write_pruned(
    world: World, tree: dict[str, Any], out: Path, method: str, sparsity: str
) -> dict[str, Tensor]:
    """Prune the base of ``tree`` into ``out`` and return its tensors."""
    options = PruningOptions(method, Sparsity.parse(sparsity), CALIBRATION)
    prune_base(parse_config(tree), options, out, world, torch.device("cpu"))
    return load_file(out / "model.safetensors")


# -- references ----------------------------------------------------------------------------------


def list_linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def append_to(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: seen.append(args[0].flatten(0, 1))


@torch.no_grad()
def iterate_reference_weights(
    model: nn.Module, found: nn.Module, windows: Tensor, method: str, sparsity: Sparsity
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, reference and weight of ``found`` of each linear of a ``transformers`` Llama.

    The inputs of a block's linears come from the whole model, whose own and later blocks are dense,
    and whose earlier blocks are taken from ``found`` when they have been compared: a tie that
    rounding decides otherwise stays in its block.
    """
    for block, own in zip(model.model.layers, found.model.layers, strict=True):
        linears, pruned = list_linears(block), list_linears(own)
        seen: dict[str, list[Tensor]] = {name: [] for name in linears}
        hooks = [m.register_forward_pre_hook(append_to(seen[n])) for n, m in linears.items()]
        for ids in windows:
            model(input_ids=ids[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        prune = prune_wanda_slowly if method == "wanda" else prune_sparsegpt_slowly
        for name, linear in linears.items():
            inputs = torch.cat(seen[name]).double()
            yield name, prune(linear.weight.double(), inputs, sparsity), pruned[name].weight
            linear.weight.copy_(pruned[name].weight)


def prune_wanda_slowly(weight: Tensor, inputs: Tensor, sparsity: Sparsity) -> Tensor:
    """``|W| * ||x||_2``, the lowest of each row or group of a row (Sun et al. 2024, section 3)."""
    new = weight.clone()
    norms = [float(column.norm()) for column in inputs.T]
    size = sparsity.group or weight.shape[1]
    zeros = sparsity.pruned or int(weight.shape[1] * sparsity.share)
    for row in new:
        for start in range(0, len(row), size):
            places = range(start, start + size)
            ranked = sorted(places, key=lambda j: abs(float(row[j])) * norms[j])
            for j in ranked[:zeros]:
                row[j] = 0
    return new


def prune_sparsegpt_slowly(
    weight: Tensor, inputs: Tensor, sparsity: Sparsity, block: int = 128
) -> Tensor:
    """Algorithm 1 of Frantar & Alistarh 2023, with an inverse Hessian of the columns left.

    The paper's Cholesky factor is a fast way to the same numbers: here the inverse of the damped
    Hessian of the columns from ``j`` on is computed again for each column.
    """
    new, columns = weight.clone(), weight.shape[1]
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.zeros_like(new, dtype=torch.bool)
    for j in range(columns):
        if sparsity.group and j % sparsity.group == 0:
            place = slice(j, j + sparsity.group)
            scores = score_columns(new, inverses, place)
            for row, own in zip(mask, scores, strict=True):
                row[j + own.argsort()[: sparsity.pruned]] = True
        elif not sparsity.group and j % block == 0:
            place = slice(j, min(j + block, columns))
            scores = score_columns(new, inverses, place)
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity.share) - 1]
            mask[:, place] = scores <= threshold
        error = torch.where(mask[:, j], new[:, j], 0) / inverses[j][0, 0]
        new[:, j:] -= error[:, None] * inverses[j][0]
        new[mask[:, j], j] = 0
    return new


def score_columns(weight: Tensor, inverses: list[Tensor], place: slice) -> Tensor:
    """``w^2 / [H^-1]_jj`` of the columns in ``place``."""
    # the OBS error has one power of the inverse's diagonal; the square of the factor's diagonal is
    # that entry of the inverse of the columns left
    diagonal = torch.stack([inverses[j][0, 0] for j in range(place.start, place.stop)])
    return weight[:, place].square() / diagonal
