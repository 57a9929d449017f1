"""IA3 adapters on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's IA3Config: target_modules, feedforward_modules
    adapter_model.safetensors   base_model.model.PATH.ia3_l  [out, 1], feed-forward: [1, in]

PEFT takes an entry of ``feedforward_modules`` for any ending of a name, also within a component,
and wants the entries among those of ``target_modules``.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_peft.adapters.ia3.merge import Ia3Merger, Rescaling
from dist_peft.adapters.peft_tensors import (
    MODULE_PREFIX,
    build_linears_config,
    group_peft_tensors,
)
from dist_peft.adapters.protocol import PeftFormat, PublicAdapter
from dist_peft.core.errors import UserError

__all__ = ["Ia3Format", "public_ia3", "read_rescalings"]


class Ia3Format(PeftFormat):
    """IA3 in PEFT's files: one rescaling vector a module."""

    peft_types = ("IA3",)
    on_gptq_linears = False

    def check(self, public: PublicAdapter) -> None:
        """Check the vectors against the configuration.

        Raises:
            UserError: ``read_rescalings`` refuses them.
        """
        read_rescalings(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type and feed-forward modules."""
        entries = config.get("feedforward_modules") or ["none"]
        shown = [entries] if isinstance(entries, str) else sorted(map(str, entries))
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"IA3 feedforward_modules={','.join(shown[:3])}{more}"

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> Ia3Merger:
        """Return the merger of the rescaling vectors.

        Raises:
            UserError: ``read_rescalings`` refuses them.
        """
        return Ia3Merger(read_rescalings(public))


def public_ia3(
    vectors: Mapping[str, Tensor],
    feedforward: Collection[str],
    all_names: Sequence[str],
    base: str,
) -> PublicAdapter:
    """Return the public form of trained parameters.

    Args:
        vectors: module path -> ``l``, whole, ``[n]``.
        feedforward: paths of those that rescale the input.
        all_names: paths of all modules of the model.
        base: path or hub id of the base.
    """
    targets, inputs = _shortest_names(set(vectors), set(feedforward), all_names)
    config = {
        **build_linears_config("IA3", targets, base),
        "feedforward_modules": inputs,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    tensors = {
        f"{MODULE_PREFIX}{path}.ia3_l": vector.reshape((1, -1) if path in feedforward else (-1, 1))
        for path, vector in vectors.items()
    }
    return PublicAdapter(config, tensors)


def _shortest_names(
    targets: set[str], feedforward: set[str], all_names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """``target_modules`` and ``feedforward_modules``: last components where PEFT takes them for
    the same modules, else whole names."""
    last = {name.rpartition(".")[2] for name in targets}
    inputs = {name.rpartition(".")[2] for name in feedforward}
    meant = {name for name in all_names if name.rpartition(".")[2] in last}
    rescaled = {name for name in targets if name.endswith(tuple(inputs))}
    if meant == targets and rescaled == feedforward:
        return sorted(last), sorted(inputs)
    return sorted(targets), sorted(feedforward)


def read_rescalings(public: PublicAdapter) -> dict[str, Rescaling]:
    """Return the vector of each module path, with every shape checked.

    Raises:
        UserError: a tensor is empty, of another method or shape, or the adapter holds more than
            rescaling vectors of linears.
    """
    modules = group_peft_tensors(public, ("ia3_l",), "IA3")
    return {
        path: _read_rescaling(f"{MODULE_PREFIX}{path}.ia3_l", path, own["ia3_l"], public.config)
        for path, own in modules.items()
    }


def _read_rescaling(key: str, path: str, value: Tensor, config: Mapping[str, Any]) -> Rescaling:
    entries = config.get("feedforward_modules")
    if not isinstance(entries, list):
        raise UserError(
            f"adapter_config.json: feedforward_modules is {entries!r}; only a list of names is "
            "read; save the adapter with a list"
        )
    # PEFT's own rule, see the module docstring
    rescales_input = any(path.endswith(str(entry)) for entry in entries)
    size = value.numel()
    wanted = (1, size) if rescales_input else (size, 1)
    if tuple(value.shape) != wanted:
        shown = "[1, in]" if rescales_input else "[out, 1]"
        raise UserError(
            f"adapter tensor {key} has shape {list(value.shape)}, not {shown} as "
            "feedforward_modules of its configuration says"
        )
    return Rescaling(value.float().flatten(), rescales_input=rescales_input)
