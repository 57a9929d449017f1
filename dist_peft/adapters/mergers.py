"""Open the merger of an adapter directory, of any method, or of trained weights of the base."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from dist_peft.adapters.adapter_format import WeightMerger, find_format
from dist_peft.adapters.classifier_head.merge import HeadMerger
from dist_peft.adapters.directory import read_adapter_directory
from dist_peft.adapters.full.format import TrainedWeightsMerger, contains_trained_weights
from dist_peft.core.errors import UserError

__all__ = ["open_adapter_merger", "open_merger"]


def open_merger(
    adapter_dir: Path, base_names: Mapping[str, str], stack: ExitStack, *, tied: bool
) -> WeightMerger:
    """Return the merger of a finished run's adapter.

    Args:
        adapter_dir: an adapter, ours, PEFT's or AdapterHub's, or trained weights.
        base_names: path of each weight in the model -> its name in the base's files.
        stack: closes the files of trained weights.
        tied: the base's output head shares the input embedding's weight, which a merge would
            change for both.

    Raises:
        UserError: damaged files, or no weight of the base can hold the adapter.
    """
    if contains_trained_weights(adapter_dir):
        return TrainedWeightsMerger.open_directory(adapter_dir, base_names, stack)
    return open_adapter_merger(adapter_dir, tied=tied)


def open_adapter_merger(adapter_dir: Path, *, tied: bool = False) -> WeightMerger:
    """Return the merger of an adapter directory, with its classifier's head if it has one.

    Raises:
        UserError: see ``open_merger``.
    """
    public = read_adapter_directory(adapter_dir)
    known = find_format(public.config)
    assert known is not None  # read_adapter_directory refuses others
    try:
        merger = known.open_merger(public, tied=tied)
    except UserError as error:
        raise UserError(f"{adapter_dir}: {error}") from None
    return merger if public.head is None else HeadMerger(merger, public.head.tensors)
