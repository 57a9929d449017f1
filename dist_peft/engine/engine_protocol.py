"""The engine protocol: shard parameters across ranks and gather them for compute.

Life of an engine::

    shard(model, blocks)       parameters are still on meta; afterwards each has a local row span
    span(p), fill(m, n, rows)  the loader asks which rows are wanted and hands them over
    optimize(m, factory, lrs)  every trainable parameter gets (sharded) optimizer state
    backward(loss, last)       gradients are summed over ranks when ``last``
    step(lr, max_norm)         clip, update, clear gradients
    state(), load_state()      live training state, in a form no engine owns (below)
    gather(p)                  a whole parameter on the CPU of every rank, checked for its shape
    gather_moment(n, key), overwrite_parameter(n, value)    for methods that act between steps
    overwrite_local_rows(updates)    other bytes in a rank's own frozen rows, between steps
    sum_over_shards(t)         sum over the ranks that together hold one copy of the base

``state()`` is a flat dict of ``param/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` -> tensor in
float32; values are plain tensors or DTensors, both of which ``torch.distributed.checkpoint``
writes by global position. So a checkpoint says nothing about the engine or the number of ranks.
Checkpoints are written from ``training_state_shards``: ``FlatShard`` where an engine shards
by elements.
``local_parameters`` of it, a rank's own part, can be loaded by the same engine in this process.

The loss handed to ``backward`` is already divided by the *global* number of target tokens of the
step; engines therefore sum gradients over ranks and never average.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_peft.core.span import Span
from dist_peft.core.trainable_steps import ALWAYS, TrainableSteps
from dist_peft.engine.flat_shard import FlatShard
from dist_peft.model.adapter_module import RowUpdate
from dist_peft.model.parameter_readers import list_unread_buffers
from dist_peft.model.stated_device import set_stated_device

__all__ = [
    "Engine",
    "OptimizerFactory",
    "build_lr_groups",
    "init_adam_state",
    "local_parameters",
    "move_buffers_to_device",
    "num_updates",
    "train_always",
    "trainable_parameters",
]


class OptimizerFactory(Protocol):
    """Makes an optimizer and knows where it keeps Adam's moments.

    ``wants_plain``: the optimizer cannot take DTensors; the engine passes it plain tensors that
    share the shards' memory, contiguous ones, and points them there again before each update.
    """

    wants_plain: bool
    moment_names: tuple[str, ...]
    """Keys of the moments that ``read_moments`` returns."""

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer: ...

    def read_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor
    ) -> dict[str, Tensor]:
        """``exp_avg``, ``exp_avg_sq`` and maybe more in float32, shaped like ``parameter``."""
        ...

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Mapping[str, Tensor]
    ) -> None: ...

    def set_num_steps(
        self, optimizer: torch.optim.Optimizer, step: int, skipped: Collection[int] = ()
    ) -> None:
        """Set the number of optimizer steps done (Adam's bias correction).

        A group of ``build_lr_groups`` has made ``num_updates(group, step, skipped)`` updates.
        """
        ...


def train_always(name: str) -> TrainableSteps:
    """Return the ``trainable_steps`` of parameters that are trained in every step."""
    return ALWAYS


class Engine(Protocol):
    """Shards a model's parameters over ranks and runs its optimizer steps."""

    device: torch.device

    @property
    def bytes_gathered(self) -> int:
        """Bytes of all-gather output that this rank received so far (padding included)."""
        ...

    def shard_model(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None: ...

    def local_row_span(self, parameter: Tensor) -> Span:
        """Return the rows (dimension 0) of ``parameter`` that this rank keeps."""
        ...

    def fill_local_rows(self, owner: nn.Module, name: str, rows: Tensor) -> None:
        """Put this rank's rows into the parameter ``owner.name``; ``len(rows) == len(span)``.

        May be called again before ``setup_optimizer``, between forwards, to replace rows.
        """
        ...

    def setup_optimizer(
        self,
        model: nn.Module,
        factory: OptimizerFactory,
        lr_scale: Callable[[str], float],
        trainable_steps: Callable[[str], TrainableSteps] = train_always,
    ) -> nn.Module:
        """Build the optimizer state of the trainable parameters.

        Args:
            lr_scale: learning-rate factor by parameter name (LoRA+).
            trainable_steps: steps in which a parameter is updated, by name. In others the model
                computes no gradient for it; the engine leaves it and its optimizer state alone.

        Returns the module to call in training steps: the model, or the engine's wrapper of it."""
        ...

    def split_optimizer(self) -> "Engine":
        """Return an engine of the same shards that gets an optimizer of its own, for some of the
        trainable parameters: ``setup_optimizer`` of a module that has these alone.

        ``backward`` is called on the engine that was split, or for a pass of one part's parameters
        alone on the part. Clipping, state and updates of each part are those of its parameters.
        """
        ...

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def keeps_parts_in_range(self) -> bool:
        """Return whether the step's gradients of all parts, which were computed together, are
        within the range of integer sums (``train.exact``). Otherwise they are dropped, and have to
        be computed part by part, which tells whose is not. Collective; after the last backward."""
        ...

    def step(self, lr: float, max_norm: float) -> float:
        """Update with learning rate ``lr`` (times each parameter's scale).

        Returns the norm of the whole gradient before clipping. Where it is not finite, no rank
        updates anything: parameters, moments and their number of updates stay, gradients are
        cleared, and the next step may follow.
        """
        ...

    def training_state_dict(self, model: nn.Module) -> dict[str, Tensor]: ...

    def training_state_shards(self, model: nn.Module) -> Mapping[str, Tensor | FlatShard]:
        """Return the same state as this rank holds it, without communication, for a checkpoint.

        Tensors that all ranks hold whole are written once.
        """
        ...

    def load_training_state_dict(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        step: int,
        skipped: Collection[int] = (),
    ) -> None:
        """Load a state returned by ``state`` after ``step`` steps, ``skipped`` of them without an
        update.

        Moments may be left out as a whole; they are then zero, as before the first step. A
        parameter may be this rank's part alone, on the CPU (``local_parameters``).
        """
        ...

    def gather_parameter(self, parameter: Tensor) -> Tensor: ...

    def gather_matching_rows(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Return those rows of a trainable parameter that this rank keeps of ``like``, which has as
        many, on the CPU; no collective where it has them already. Every rank calls it."""
        ...

    def gather_moment(self, name: str, key: str) -> Tensor:
        """Return the whole moment ``key`` of the trainable parameter with this full name, on the
        CPU of every rank."""
        ...

    def overwrite_parameter(self, name: str, value: Tensor) -> None:
        """Replace a trainable parameter between two steps.

        Args:
            value: whole, the same on every rank.
        """
        ...

    def overwrite_local_rows(self, updates: Iterable[RowUpdate]) -> None:
        """Replace the bytes of this rank's rows of frozen parameters between two steps.

        Objects, shapes and the numbers of gathers stay. Every rank passes the same parameters in
        the same order, since computing an update may be a collective.
        """
        ...

    def get_local_bytes(self, parameter: Tensor) -> Tensor | None:
        """Return this rank's rows of a parameter that has no storage of its own, as bytes.

        None for all others: a DTensor, or whole.
        """
        ...

    def sum_over_shards(self, tensor: Tensor) -> Tensor: ...


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by full name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local_parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU copies of this rank's part of each ``param/NAME`` of a ``state()``."""
    values = {key: value for key, value in state.items() if key.startswith("param/")}
    own = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in values.items()}
    return {key: value.detach().to("cpu", copy=True) for key, value in own.items()}


def init_adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return Adam's state before the first update: step 0, moments zero like ``parameter``."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def build_lr_groups(
    parameters: Mapping[str, nn.Parameter],
    lr_scale: Callable[[str], float],
    trainable_steps: Callable[[str], TrainableSteps] = train_always,
) -> list[dict[str, Any]]:
    """Optimizer groups: parameters of the same learning-rate factor, kept as ``get_lr_scale``, and
    of the same ``trainable_steps``."""
    groups: dict[tuple[float, TrainableSteps], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        scale, steps = key = lr_scale(name), trainable_steps(name)
        group = groups.setdefault(key, {"params": [], "lr_scale": scale, "trainable_steps": steps})
        group["params"].append(parameter)
    return list(groups.values())


def num_updates(group: Mapping[str, Any], step: int, skipped: Collection[int] = ()) -> int:
    """Return the number of updates of a group after ``step`` steps.

    Args:
        skipped: numbers of the steps, from 1, whose update was left out.
    """
    steps: TrainableSteps = group.get("trainable_steps", ALWAYS)
    left_out = sum(number <= step and steps.includes(number - 1) for number in skipped)
    return steps.count_until(step) - left_out


def move_buffers_to_device(model: nn.Module, device: torch.device) -> None:
    """Move every buffer to ``device``, the model's own from now on (``model.stated_device``);
    buffers are small and whole on every rank.

    One without data becomes zeros if it is a tower's, which nothing runs, and stays as it is
    otherwise: loading fails then.
    """
    set_stated_device(model, device)
    unread = list_unread_buffers(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))
            elif id(buffer) in unread:
                setattr(module, name, torch.zeros_like(buffer, device=device))
