"""Which modules read the parameters outside of the blocks, seen in a forward on fake tensors.

Engines gather a parameter right before a module that reads it and free it afterwards. Most modules
read their own parameters; with tied embeddings two modules read one; some code reads
``self.layer.weight`` from outside. A forward tells (``model.forward_probe``)::

    embed_tokens.weight        read in embed_tokens
    embed_tokens.weight, tied  read in embed_tokens and in lm_head
    vision_tower. ...          read by no module: an input of tokens does not come there
    gate.weight                read in the code of the model itself, or in a block: no reader
    mask_emb                   not read, but its module is called: no reader (other inputs read it)

A reader is the outermost module in whose forward the parameter is read, among those that neither
contain a block nor are in one. Parameters that no module reads, of modules that are not called, are
not loaded.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_peft.model.frozen_linear import FrozenWeight

__all__ = [
    "FoundReaders",
    "ReaderWatch",
    "find_readers",
    "is_never_read",
    "is_read_by_root",
    "list_unread_buffers",
    "list_unread_parameters",
    "mark_readers",
    "refuse_forward",
]

FoundReaders = Mapping[tuple[str, str], tuple[str, ...] | None]
"""Path of a module and name of its parameter -> paths of its readers; None: the model's own code
or a block reads it."""


class ReaderWatch:
    """Watches a forward of a model.

    Args:
        blocks: of the model; their own parameters, and whatever they read of others, do not matter.

    Attributes:
        found: the readers, after ``watch_forward``, of parameters outside of the blocks that are
            read, or are not read and of no module that is called.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.found: FoundReaders = {}

    @contextmanager
    def watch_forward(self, model: nn.Module) -> Iterator[None]:
        """Watch the forward that runs inside, once.

        Args:
            model: with the parameters, fake ones perhaps, that it computes with.
        """
        mode = _ReaderMode(model, self.blocks)
        hooks = [
            register_module_forward_pre_hook(lambda module, inputs: mode.enter_module(module)),
            register_module_forward_hook(lambda *_: mode.leave_module(), always_call=True),
        ]
        try:
            with mode:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.found = mode.find_readers()


class _ReaderMode(TorchDispatchMode):
    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self._paths_to_modules = dict(model.named_modules())
        self._paths = {module: path for path, module in self._paths_to_modules.items()}
        self._inside = {module for block in blocks for module in block.modules()}
        starts = [self._paths[block] for block in blocks if block in self._paths]
        self._around = {m for m, p in self._paths.items() if any(_is_under(s, p) for s in starts)}
        self._owners: dict[int, list[tuple[str, str]]] = {}
        for module, path in self._paths.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and module not in self._inside:
                    self._owners.setdefault(_get_storage_key(parameter), []).append((path, name))
        self._active: list[nn.Module] = []
        self._called: set[nn.Module] = set()
        self._readers: dict[int, set[nn.Module | None]] = {key: set() for key in self._owners}

    def find_readers(self) -> FoundReaders:
        found: dict[tuple[str, str], tuple[str, ...] | None] = {}
        for key, owners in self._owners.items():
            readers = self._readers[key]
            is_called = any(self._paths_to_modules[path] in self._called for path, _ in owners)
            if None in readers:
                found.update(dict.fromkeys(owners))
            elif readers or not is_called:
                paths = tuple(sorted(self._paths[m] for m in readers if m is not None))
                found.update(dict.fromkeys(owners, paths))
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note_read(tensor)
        return func(*args, **(kwargs or {}))

    def _note_read(self, tensor: Tensor) -> None:
        key = _get_storage_key(tensor)
        if key in self._owners:
            self._readers[key].add(self._find_reader())

    def _find_reader(self) -> nn.Module | None:
        for module in self._active:  # outermost first
            if module not in self._around:
                return None if module in self._inside else module
        return None

    def enter_module(self, module: nn.Module) -> None:
        self._active.append(module)
        self._called.add(module)
        if isinstance(module, FrozenWeight):  # a probe may skip its operators
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._note_read(parameter)

    def leave_module(self) -> None:
        self._active.pop()


def _is_under(path: str, ancestor: str) -> bool:
    return not ancestor or path.startswith(f"{ancestor}.")


def _get_storage_key(tensor: Tensor) -> int:
    """Return a number shared by all views of a tensor."""
    if tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage()._cdata


# -- marks on modules ----------------------------------------------------------------------------


def mark_readers(model: nn.Module, found: FoundReaders) -> None:
    """Remember the readers with the modules that own the parameters."""
    for (path, name), readers in found.items():
        marks = vars(model.get_submodule(path)).setdefault("parameter_readers", {})
        marks[name] = None if readers is None else tuple(map(model.get_submodule, readers))


def find_readers(owner: nn.Module, name: str) -> tuple[nn.Module, ...] | None:
    """Return the modules in whose forwards ``owner.name`` is read; None: not known, or others."""
    found: tuple[nn.Module, ...] | None = vars(owner).get("parameter_readers", {}).get(name)
    return found


def is_read_by_root(owner: nn.Module, name: str) -> bool:
    """Return whether a forward has shown that the model's own code, or a block, reads
    ``owner.name``."""
    marks = vars(owner).get("parameter_readers", {})
    return name in marks and marks[name] is None


def is_never_read(owner: nn.Module, name: str) -> bool:
    """Return whether the frozen parameter ``owner.name`` is read by nothing: it is not loaded."""
    parameter = owner._parameters.get(name)
    frozen = parameter is not None and not parameter.requires_grad
    return frozen and find_readers(owner, name) == ()


def list_unread_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters that are never read, by ``id``."""
    return {
        id(parameter): parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_never_read(module, name)
    }


def list_unread_buffers(model: nn.Module) -> set[int]:
    """Return ``id`` of the buffers in modules that have parameters, all of them never read: of
    towers, which are not called."""
    found: set[int] = set()
    unread = list_unread_parameters(model)
    for module in model.modules():
        own = list(module.parameters())
        if own and all(id(parameter) in unread for parameter in own):
            found |= {id(buffer) for buffer in module.buffers()}
    return found


def refuse_forward(owner: nn.Module, path: str) -> None:
    """Let a call of ``owner``, which was not loaded, fail with a message."""
    owner.register_forward_pre_hook(functools.partial(_raise_not_loaded, path))


def _raise_not_loaded(path: str, module: nn.Module, inputs: object) -> None:
    raise RuntimeError(
        f"{path} was not loaded, since a forward of tokens did not come there, and is called now"
    )
