"""``dist-peft combine``: combine several LoRA adapters of one base into one."""

import argparse
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.lora.combination import CombineRecipe, combine_adapters
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.app.config_arguments import parse_path
from dist_peft.app.output_places import refuse_taken_place
from dist_peft.core.errors import UserError
from dist_peft.core.log import setup_log
from dist_peft.core.world import World
from dist_peft.store.base_record import BaseRecord
from dist_peft.store.publish import check_output_free, publish_directory

__all__ = ["add_arguments", "run"]

log = logging.getLogger("dist_peft")

_OF_BASE = {
    *("base", "base_fingerprint", "base_content", "base_quantized", "base_made_from"),
    *("quant", "codec_version"),
}
"""Keys of ``dist_peft.json`` that the combined adapter inherits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", type=parse_path, metavar="ADAPTER", help="adapter or run directories"
    )
    parser.add_argument("--out", type=parse_path, required=True, help="new directory")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one an adapter; default: 1 / number"
    )
    parser.add_argument("--method", choices=["linear", "ties", "dare"], default="linear")
    parser.add_argument(
        "--density", type=float, help="ties, dare: share of the entries kept; default 0.5"
    )
    parser.add_argument(
        "--rank", type=int, help="of the result; default: the sum of the adapters' ranks"
    )
    parser.add_argument("--seed", type=int, help="dare: which entries are dropped; default 0")


def run(args: argparse.Namespace, world: World) -> int:
    if world.size > 1:
        raise UserError(f"this verb runs in one process, not {world.size}; start it with python")
    setup_log(None, world.rank, world.size)
    directories = [_find_adapter_directory(path) for path in args.adapters]
    weights = args.weights or [1 / len(directories)] * len(directories)
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {weights}: give finite numbers")
    recipe = _parse_merge_recipe(args)
    if len(weights) != len(directories):
        raise UserError(f"--weights has {len(weights)} numbers for {len(directories)} adapters")
    if len(set(directories)) < len(directories):
        raise UserError("an adapter is named twice")
    refuse_taken_place(args.out, "--out")
    check_output_free(args.out)
    metadata = [read_adapter_metadata(directory) for directory in directories]
    adapters = {str(d): read_adapter_directory(d) for d in directories}
    for directory, adapter in adapters.items():
        if adapter.head is not None:
            raise UserError(
                f"{directory} has a classification head, which was trained for its own classes: "
                "heads do not add up to anything"
            )
    _check_same_base(directories, metadata, [a.config for a in adapters.values()])
    combined, kept = combine_adapters(adapters, weights, recipe)
    about = {
        **{k: v for k, v in metadata[0].items() if k in _OF_BASE},
        "combined": [[d.name, w] for d, w in zip(directories, weights, strict=True)],
        "method": recipe.method,
        "dist_peft": version("dist_peft"),
    }
    with publish_directory(args.out) as partial:
        write_adapter_directory(partial, combined, about)
    log.info(
        "wrote %s: %d adapters by %s, rank %d, with %.2f %% of the combined change",
        args.out,
        len(adapters),
        recipe.method,
        combined.config["r"],
        100 * kept,
    )
    return 0


def _parse_merge_recipe(args: argparse.Namespace) -> CombineRecipe:
    """Parse the options of the method; raises UserError on unused or out-of-range options."""
    given = {
        name: value
        for name in ("density", "rank", "seed")
        if (value := getattr(args, name)) is not None
    }
    for name, methods in (("density", ("ties", "dare")), ("seed", ("dare",))):
        if name in given and args.method not in methods:
            raise UserError(f"--{name} is for --method {' or '.join(methods)}")
    if not 0 < given.get("density", 0.5) <= 1:
        raise UserError(f"--density {given['density']} is not above 0 and at most 1")
    if given.get("rank", 1) < 1:
        raise UserError(f"--rank {given['rank']} is not at least 1")
    return CombineRecipe(args.method, **given)


def _find_adapter_directory(path: Path) -> Path:
    """Return the adapter directory: ``path`` itself, or ``adapter/`` of a run."""
    inside = path / "adapter"
    found = inside if (inside / "adapter_config.json").is_file() else path
    if not (found / "adapter_config.json").is_file():
        raise UserError(f"{path} has no adapter_config.json: it is no adapter and no finished run")
    return found.resolve()


def _check_same_base(
    directories: list[Path], metadata: list[dict[str, Any]], configs: list[dict[str, Any]]
) -> None:
    """Raise UserError if bases differ; warn about different names if they cannot be compared."""
    records = [
        BaseRecord.from_metadata(about, directory / "dist_peft.json")
        for directory, about in zip(directories, metadata, strict=True)
    ]
    names = [config.get("base_model_name_or_path") for config in configs]
    for directory, record, name in zip(directories[1:], records[1:], names[1:], strict=True):
        if why := records[0].describe_difference(record):
            raise UserError(
                f"{directory} and {directories[0]} were trained on different bases ({name}, "
                f"{names[0]}): {why}; their changes do not add up to anything"
            )
        if not records[0].is_comparable(record) and name != names[0]:
            log.warning("%s was trained on %s, the first adapter on %s", directory, name, names[0])
