"""A trained head on disk: stored as PEFT does with PEFT's adapters, as AdapterHub does with theirs.

PEFT keeps whole modules in the adapter's own file; which ones, ``modules_to_save`` says::

    adapter_config.json          task_type: SEQ_CLS, modules_to_save: [classifier]
    adapter_model.safetensors    base_model.model.classifier.weight [classes, hidden], .bias

The library ``adapters`` has files of their own for the head of a model such as
``BertForSequenceClassification``, which ``load_adapter(DIR, use_safetensors=True)`` reads too::

    head_config.json             model_class, num_labels, label2id, ...
    model_head.safetensors       classifier.weight, classifier.bias

Names of the classes are ``labels`` in ``dist_peft.json``; without it they are numbers.
"""

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dist_peft.adapters.classifier_head.router_format import join_peft_routers, split_peft_routers
from dist_peft.adapters.protocol import PublicAdapter, PublicHead
from dist_peft.store.writer import write_atomically

__all__ = [
    "SAFE_HEAD",
    "join_peft_head",
    "read_head",
    "split_peft_head",
    "write_adapterhub_head",
]

SAFE_HEAD = "model_head.safetensors"
_HEAD_CONFIG = "head_config.json"
_PREFIX = "base_model.model."
_POOLER = "pooler"


def join_peft_head(public: PublicAdapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of PEFT's files, with the head if there is one."""
    if public.head is None:
        return public.config, public.tensors
    if not public.head.labels:
        return join_peft_routers(public)
    modules = list(dict.fromkeys(_saved_module(name) for name in public.head.tensors))
    config = {**public.config, "task_type": "SEQ_CLS", "modules_to_save": modules}
    mine = {f"{_PREFIX}{name}": value for name, value in public.head.tensors.items()}
    return config, {**public.tensors, **mine}


def _saved_module(name: str) -> str:
    """Return the module that PEFT saves for a parameter: ``classifier``, or ``bert.pooler``."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(_POOLER) + 1 if _POOLER in parts else 1])


def split_peft_head(
    config: dict[str, Any], tensors: dict[str, Tensor], labels: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor], PublicHead | None]:
    """Split a joined adapter into the method's configuration and tensors, and the head.

    Args:
        config, tensors: of PEFT's files.
        labels: names of the classes, where they are known.
    """
    saved = config.get("modules_to_save") or ()
    if routers := split_peft_routers(config, tensors):
        return routers
    inside = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, saved))})\..*")
    names = {key: key.removeprefix(_PREFIX) for key in tensors}
    head = {n: tensors[k] for k, n in names.items() if saved and inside.fullmatch(n)}
    if config.get("task_type") != "SEQ_CLS" or not head:
        return config, tensors, None
    others = {key: value for key, value in tensors.items() if names[key] not in head}
    return {**config, "modules_to_save": None}, others, read_head(head, labels)


def read_head(tensors: dict[str, Tensor], labels: tuple[str, ...]) -> PublicHead:
    """A head of these parameters, at least one; see ``split_peft_head``."""
    if not labels:  # the classes are the rows of the last matrix
        last = next(value for value in reversed(list(tensors.values())) if value.dim() == 2)
        labels = tuple(str(number) for number in range(len(last)))
    return PublicHead(labels, tensors)


def write_adapterhub_head(directory: Path, public: PublicAdapter) -> None:
    """Write the library's files of the head, if there is one.

    Raises:
        UserError: the disk is full.
    """
    if public.head is None:
        return
    assert public.head.model_class, "a head that PEFT wrote has no place here"
    about = {k: v for k, v in public.config.items() if k not in ("config", "name")}
    label2id = {label: number for number, label in enumerate(public.head.labels)}
    config = {
        **about,
        "config": None,
        "name": None,
        "model_class": public.head.model_class,
        "label2id": label2id,
        "num_labels": len(label2id),
    }
    data = safetensors.torch.save(public.head.tensors, {"format": "pt"})
    write_atomically(directory / SAFE_HEAD, data)
    write_atomically(directory / _HEAD_CONFIG, json.dumps(config, indent=2) + "\n")
