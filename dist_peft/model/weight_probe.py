"""Find linears whose weight is read by the module around them.

A packed or adapted linear is called like any other, but has no ``weight``. Some families read it
all the same: Mamba-2 mixers pass ``self.out_proj.weight`` to a fused kernel, DSA indexers look at
``self.weights_proj.weight.dtype``. Such linears must stay plain.

The classes' source is searched, since a forward on the CPU does not take the branch that calls the
GPU's kernel. One class is searched once, whatever the number of layers. Reads through variables,
which the source does not show, are found by a forward afterwards (``model.forward_probe``).
"""

import ast
import functools
import inspect
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_peft.core.errors import UserError
from dist_peft.model.tied_weights import list_tied_names

__all__ = ["find_externally_read_linears", "list_weights_read_by", "refuse_unsupported_blocks"]

_REFUSED = {
    "rwkv": "its code divides weights of the blocks in place at the first forward, which is lost "
    "or done twice where weights are sharded and packed",
    "kyutai_speech_to_text": "each of its positions has a token of text and codes of sound, and "
    "only text is trained",
}
"""Model type -> why its forward cannot be reproduced with packed weights."""

_OUTSIDE_OF_FORWARD = ("__init__", "reset_parameters", "_init_weights", "extra_repr", "__repr__")


def refuse_unsupported_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], path: str
) -> None:
    """Refuse families whose blocks cannot be frozen linear by linear.

    Raises:
        UserError: names the cause; nothing has been loaded.
    """
    kind = model.config.model_type
    if why := _REFUSED.get(kind):
        raise UserError(f"base.path {path} of type {kind!r} is not supported: {why}")
    inside = {id(p) for block in blocks for p in block.parameters()}
    for first, others in list_tied_names(model).items():
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in (first, others[0])]
        linears = all(isinstance(owner, nn.Linear) for owner in owners)
        if linears and owners[0] is not owners[1] and id(model.get_parameter(first)) in inside:
            raise UserError(
                f"base.path {path} of type {kind!r} is not supported: its layers share weights "
                f"({others[0]} is {first}), and each layer's weights are sharded and adapted on "
                "their own here"
            )


def find_externally_read_linears(model: nn.Module) -> set[int]:
    """Return ``id`` of the linears in ``model`` whose weight or bias other modules' code reads."""
    found: set[int] = set()
    for module in model.modules():
        for path in list_weights_read_by(cast(Hashable, type(module))):
            try:
                child = module.get_submodule(path)
            except AttributeError:  # only in some variants of the class
                continue
            if isinstance(child, nn.Linear | Conv1D):
                found.add(id(child))
    return found


@functools.cache
def list_weights_read_by(kind: Hashable) -> frozenset[str]:
    """Return paths ``a.b`` of which methods of ``kind`` read ``self.a.b.weight`` or ``.bias``."""
    found: set[str] = set()
    assert isinstance(kind, type)
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(sys.modules[base.__module__])
            found |= _list_reads_by_class(source).get(base.__qualname__, frozenset())
        except (KeyError, OSError, TypeError, SyntaxError):  # classes made at run time
            continue
    return frozenset(found)


@functools.lru_cache(maxsize=32)
def _list_reads_by_class(source: str) -> dict[str, frozenset[str]]:
    """Return the paths by ``__qualname__`` of the class, for all classes of a module's source.

    A module has many classes, and ``inspect.getsource`` would parse it for each of them.
    """
    found: dict[str, frozenset[str]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.ClassDef):
                name = prefix + child.name
                found[name] = found.get(name, frozenset()) | _list_reads_in(child)
                inner = f"{name}."
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = f"{prefix}{child.name}.<locals>."
            if not isinstance(child, ast.expr):
                visit(child, inner)

    visit(ast.parse(source), "")
    return found


def _list_reads_in(kind: ast.ClassDef) -> frozenset[str]:
    return frozenset(
        path
        for function in ast.walk(kind)
        if isinstance(function, ast.FunctionDef) and function.name not in _OUTSIDE_OF_FORWARD
        for path in _iterate_weight_paths(function)
    )


def _iterate_weight_paths(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
            names: list[str] = []
            owner = node.value
            while isinstance(owner, ast.Attribute):
                names.append(owner.attr)
                owner = owner.value
            if names and isinstance(owner, ast.Name) and owner.id == "self":
                yield ".".join(reversed(names))
