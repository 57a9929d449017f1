"""Write the trained base weights of full and partial fine-tuning, one tensor at a time."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_peft.adapters.full.format import WeightsWriter
from dist_peft.adapters.protocol import TrainsBaseWeights
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.progress_beat import mark_progress
from dist_peft.core.world import World

__all__ = ["write_trained_weights"]


def write_trained_weights(
    built: LoadedModel,
    world: World,
    directory: Path,
    metadata: Mapping[str, Any],
    add_files: Callable[[Path], object],
) -> None:
    """Write ``directory`` (format: ``adapters.full.format``) from the first rank.

    All ranks gather one tensor at a time and free it, so that memory holds one unsharded tensor.

    Args:
        add_files: called on the first rank; writes further files into the directory that it gets,
            before it is published.

    Raises:
        UserError: the disk is full or not writable (on every rank).
    """
    assert isinstance(built.setup.adapter, TrainsBaseWeights)
    sources, tensors = built.setup.adapter.list_source_tensors(), built.setup.skeleton.tensors
    writer: WeightsWriter | None = None
    with ExitStack() as stack:  # after any error nothing is left
        with world.raise_together("start to write the trained weights"):
            if world.is_first:
                shapes = {source: tensors[source].shape for source in sources.values()}
                writer = stack.enter_context(WeightsWriter(directory, shapes, metadata))
        for name, source in sources.items():
            whole = built.engine.gather_parameter(built.get_parameter(name))
            if writer is not None:
                writer.write_parameter(source, whole)
            mark_progress()
        with world.raise_together("write the trained weights"):
            if writer is not None:
                add_files(writer.staged_directory)
                writer.close()
