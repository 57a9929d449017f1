"""Tied weights: the files decide whether to tie, as in ``from_pretrained``.

``tie_word_embeddings: true`` says that the output head uses the input embedding's weight (some
families tie further modules). The result depends on the files:

    only the embedding, or only the head    one parameter, read from the tensor that is there
    both, equal in the type of the model    one parameter
    both, different                         two parameters: the configuration is wrong about the
                                            files, and tying would drop a trained head

A directory that is written from such a base says ``tie_word_embeddings: false``
(``read_untied_config_keys``), because runtimes other than ``transformers`` believe the
configuration and drop one of the two tensors.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dist_peft.core.log import ONCE
from dist_peft.core.span import Span
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader

__all__ = ["list_tied_names", "read_untied_config_keys", "untie_different_weights"]

log = logging.getLogger("dist_peft")

_CHUNK_BYTES = 16 * 2**20


def list_tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return full name of each shared parameter in ``named_parameters`` -> its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def untie_different_weights(
    model: PreTrainedModel,
    index: SafetensorsIndex,
    find: Callable[[str], str | None],
) -> list[str]:
    """Untie those tied parameters of ``model`` whose tensors in the files differ.

    Tensors are compared in the type of the parameter, chunk by chunk up to the first difference;
    equal ones are read whole, once.

    Args:
        find: returns the tensor in the files for a parameter of this name, or None.

    Returns:
        Full names of the parameters that are now their own.

    Raises:
        UserError: a file is damaged.
    """
    untied: list[str] = []
    for first, others in list_tied_names(model).items():
        parameter = model.get_parameter(first)
        # some families tie more than two: weights equal to the first stay tied to it
        source = find(first)
        for name in others:
            target = find(name)
            if source is None or target is None or source == target:
                continue
            if _are_tensors_equal(index, source, target, parameter.dtype):
                continue
            path, _, own = name.rpartition(".")
            copy = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            setattr(model.get_submodule(path), own, copy)
            untied.append(name)
            log.warning(
                "config.json of %s ties %s to %s, but the files have both with different values: "
                "they are two weights here, as in transformers; set tie_word_embeddings: false in "
                "config.json",
                index.path,
                name,
                first,
                extra=ONCE,
            )
    return untied


def _are_tensors_equal(
    index: SafetensorsIndex, first: str, second: str, dtype: torch.dtype
) -> bool:
    one, other = index.tensors[first], index.tensors[second]
    if one.shape != other.shape:
        return False
    rows = max(1, _CHUNK_BYTES // max(1, one.row_bytes))
    with RowReader(index) as reader:
        return all(
            torch.equal(
                reader.read_rows(first, span).to(dtype), reader.read_rows(second, span).to(dtype)
            )
            for span in Span(0, one.num_rows).split_into_chunks(rows)
        )


def read_untied_config_keys(directory: Path) -> Mapping[str, Any]:
    """Return the ``config.json`` keys that untie the head of ``directory``'s model."""
    config = json.loads((directory / "config.json").read_text())
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changes["text_config"] = {**text, "tie_word_embeddings": False}
    return changes
