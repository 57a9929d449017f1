"""Write the trained base weights of full and partial fine-tuning, one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_peft.adapters.full.format import WeightsWriter
from dist_peft.adapters.protocol import TrainsBase
from dist_peft.app.model_setup import Built
from dist_peft.core.world import World

__all__ = ["write_trained_weights"]


def write_trained_weights(
    built: Built, world: World, directory: Path, metadata: Mapping[str, Any]
) -> None:
    """Write ``directory`` (format: ``adapters.full.format``) from the first rank.

    All ranks gather one tensor at a time and free it, so that memory holds one unsharded tensor.

    Raises:
        UserError: the disk is full or not writable (on every rank).
    """
    assert isinstance(built.adapter, TrainsBase)
    sources, tensors = built.adapter.sources(), built.skeleton.tensors
    writer: WeightsWriter | None = None
    with world.together("start to write the trained weights"):
        if world.is_first:
            shapes = {source: tensors[source].shape for source in sources.values()}
            writer = WeightsWriter(directory, shapes, metadata)
    for name, source in sources.items():
        whole = built.engine.gather(built.parameter(name))
        if writer is not None:
            writer.write(source, whole)
    with world.together("write the trained weights"):
        if writer is not None:
            writer.close()
