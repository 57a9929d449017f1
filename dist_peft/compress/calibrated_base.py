"""Write a base with GPTQ's factors (``model.gptq_factors`` has the layout).

The unquantized tensors are copied, so that the directory is complete wherever it is moved, and the
factors are written while the driver makes them. ``store.publish`` lets the directory appear as a
whole.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dist_peft.compress.base_writer import copy_base_tensors, open_base_writer
from dist_peft.core.config.run import BaseConfig
from dist_peft.core.world import World
from dist_peft.model.gptq_factors import ABOUT_FILE, FACTORS
from dist_peft.model.hub import read_json_object
from dist_peft.model.model_files import copy_model_files
from dist_peft.model.skeleton import Skeleton, parse_torch_dtype
from dist_peft.quant.calibrated_codec import StoredFactor
from dist_peft.quant.gptq import HessianFactor
from dist_peft.store.fileio import translate_write_errors
from dist_peft.store.staged_model import StagedModel
from dist_peft.store.writer import TensorSpec

__all__ = ["FactorWriter", "open_calibrated_writer", "write_calibrated_base"]


class FactorWriter:
    """Writes factors into the directory of a staged model, on the first rank.

    Attributes:
        files: name of each linear's weight -> its factor's file.
    """

    def __init__(self, model_directory: Path) -> None:
        self.directory = model_directory / FACTORS
        self.files: dict[str, str] = {}

    def write_factor(self, sources: Sequence[str], factor: HessianFactor) -> None:
        """Write the factor that the linears ``sources`` share.

        Raises:
            UserError: no space or no permission.
        """
        name = f"{len(set(self.files.values()))}.safetensors"
        file = self.directory / name
        with translate_write_errors(file, 4 * factor.upper.numel()):
            self.directory.mkdir(exist_ok=True)
            StoredFactor.write_factor(factor, file)
        self.files |= dict.fromkeys(sources, name)

    def write_about(self, base: BaseConfig, origin: Mapping[str, Any]) -> None:
        """Write bits, groups, origin and the names of the files.

        Raises:
            UserError: no space or no permission.
        """
        assert base.quant is not None
        about = {
            "bits": base.quant.bits,
            "group_size": base.quant.group_size,
            "made_from": dict(origin),
            "files": self.files,
        }
        file, text = self.directory / ABOUT_FILE, json.dumps(about, indent=2) + "\n"
        with translate_write_errors(file, len(text)):
            file.write_text(text, encoding="utf-8")


def open_calibrated_writer(
    skeleton: Skeleton, out: Path, world: World
) -> AbstractContextManager[StagedModel | None]:
    """Open the writer of a base with factors (``base_writer.open_base_writer``).

    Raises:
        UserError: on every rank: no space or no permission.
    """
    infos = skeleton.index.tensors.items()
    specs = [TensorSpec(name, info.dtype, info.shape) for name, info in infos]
    return open_base_writer(specs, out, world)


def write_calibrated_base(
    base: BaseConfig,
    skeleton: Skeleton,
    origin: Mapping[str, Any],
    world: World,
    writer: StagedModel | None,
    factors: FactorWriter | None,
) -> None:
    """Copy the unquantized base on rank 0, describe the factors and publish the directory.

    Args:
        base: the unquantized base, and the quantization that the factors are for.
        skeleton: of this base.
        origin: ``made_from`` in ``about.json``.
        writer: of ``open_calibrated_writer``.
        factors: has written the factors, where ``writer`` is.

    Raises:
        UserError: on every rank: no space or no permission.
    """
    with world.raise_together("write the base with its factors"):
        if writer is None or factors is None:
            return
        copy_base_tensors(skeleton.index, (), writer)
        source = skeleton.index.path
        known = read_json_object(source / "config.json")
        named = known.get("dtype") or known.get("torch_dtype")
        dtype = parse_torch_dtype(named if isinstance(named, str) else base.compute_dtype)
        copy_model_files(source, writer.directory, dtype, {}, code=base.trust_remote_code)
        factors.write_about(base, origin)
        writer.publish()
