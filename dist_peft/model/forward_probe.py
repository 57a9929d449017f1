"""One forward on fake tensors, without memory or arithmetic, before weights are loaded.

A family's own code may treat a packed linear as a plain one: read its weight through a local
variable, ask for its type, change it. ``model.weight_probe`` finds ``self.a.b.weight`` in the
source; here the code runs. All parameters and buffers are replaced by fake tensors
(``torch._subclasses``: meta tensors that name a device), packed linears and experts return a fake
tensor of the right shape without dequantizing, and afterwards the attributes of every module are
restored.

A failure is diagnosed by running the forward again with the linears that ``transformers`` built. If
that fails, too, the family's code cannot run on fake tensors (it asks for values, such as which
tokens an expert gets), and nothing is concluded.

Of blocks that are built alike one is run; the others return its output.

The run has a graph and a number added to the output of each packed linear. Linears whose
numbers get no gradient (they only pick indices, as DSA indexers do, or are not run, as a decoder's
attention to an absent encoder) cannot be trained, and ``all-linear`` leaves them out. It also tells
which modules read the parameters outside of the blocks (``model.parameter_readers``).

A process that builds the same model again (an export, the next task) reuses a good outcome.
"""

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from dist_peft.core.errors import UserError
from dist_peft.model.block_kinds import block_kind
from dist_peft.model.computation_key import describe_computation
from dist_peft.model.document_attention import DOCUMENT_ATTENTION
from dist_peft.model.fake_tensors import (
    fake_frozen_forwards,
    quiet_fake_tensors,
    replace_with_fake_tensors,
)
from dist_peft.model.freezing import FrozenReplacement
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.parameter_readers import FoundReaders, ReaderWatch, mark_readers
from dist_peft.model.text_inputs import refuse_wanted_inputs

__all__ = [
    "ON_ANY_DEVICE",
    "PROBE_TOKENS",
    "probe_forward",
    "restore_own_attributes",
    "runs_with_mask",
]

log = logging.getLogger(__name__)

PROBE_TOKENS = 8
ON_ANY_DEVICE = ("eager", "sdpa", DOCUMENT_ATTENTION)
"""Implementations of attention that run on fake tensors of the CPU."""


def probe_forward(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    replaced: list[FrozenReplacement],
    path: str,
) -> None:
    """Run the forward of a frozen model on fake tensors.

    A linear whose weight the code reads is restored as ``transformers`` built it, with those of the
    other layers, and the forward is run again.

    Args:
        replaced: linears and experts that were frozen; restored ones are removed.
        path: ``base.path``, for messages.

    Sets ``without_gradient`` of packed linears, and ``head_output_is_logits`` of the model: whether
    its logits are the output of its head, neither scaled nor capped afterwards. Marks the readers
    of parameters outside of the blocks.

    Raises:
        UserError: the forward fails with packed linears and not with the original ones, it
            changes weights, or it wants more than tokens.
    """
    if _mark_without_gradient(model, blocks, replaced):
        return  # what runs with a graph runs without one
    error = _find_forward_error(model, blocks)
    while (kind := _find_linear_read_by(error, replaced)) is not None:
        for one in [one for one in replaced if one.module_kind == kind]:
            one.restore_original()
            replaced.remove(one)
        log.info("%s stays plain: other code reads its weight", kind)
        error = _find_forward_error(model, blocks)
    if error is None:
        _mark_without_gradient(model, blocks, replaced)
        return
    if any(isinstance(one.frozen, FrozenEmbedding) for one in replaced):
        ends = [one for one in replaced if one.is_end]
        if _works_with_originals(model, blocks, ends):
            raise UserError(
                f"base.quant.embeddings: the code of base.path {path}, type "
                f"{model.config.model_type!r}, does not work with a packed embedding and head: "
                f"{_describe_cause(error)}; set it to false"
            )
    linears = [one for one in replaced if isinstance(one.frozen, FrozenLinear)]
    if isinstance(error, _ChangedWeightsError) or any(
        _works_with_originals(model, blocks, some) for some in (linears, replaced)
    ):
        raise UserError(
            f"base.path {path} of type {model.config.model_type!r} is not supported: its code does "
            f"not work with packed linears: {_describe_cause(error)}"
        )
    refuse_wanted_inputs(model, error, path)
    log.debug("the forward of %s cannot be tried without weights: %s", path, _describe_cause(error))


class _ChangedWeightsError(Exception):
    """The forward writes to parameters."""


def _works_with_originals(
    model: PreTrainedModel, blocks: Sequence[nn.Module], replaced: Sequence[FrozenReplacement]
) -> bool:
    for one in replaced:
        one.restore_original()
    try:
        return bool(replaced) and _find_forward_error(model, blocks) is None
    finally:
        for one in replaced:
            one.install_frozen()


def _find_linear_read_by(
    error: Exception | None, replaced: Sequence[FrozenReplacement]
) -> str | None:
    """Return the kind of the frozen linear that raised an ``AttributeError``, else None."""
    if not isinstance(error, AttributeError):
        return None
    found = (one for one in replaced if one.frozen is error.obj)
    return next((o.module_kind for o in found if isinstance(o.frozen, FrozenLinear)), None)


def _describe_cause(error: Exception) -> str:
    """Return type, text and the place in the family's code."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    place = ""
    if outside:
        place = f" ({Path(outside[-1].filename).name}, line {outside[-1].lineno})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"


def _find_forward_error(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Exception | None:
    """Return the error of the forward on fake tensors, each kind of block run once, or None.

    Blocks may look alike by their modules only, so a failure is confirmed by a run of all of them.
    """
    error = _run_forward(model, blocks)
    return None if error is None else _run_forward(model, ())


def _mark_without_gradient(
    model: PreTrainedModel, blocks: Sequence[nn.Module], replaced: Sequence[FrozenReplacement]
) -> bool:
    """Set ``without_gradient`` by kind of linear: of blocks that are alike, one is run.

    Returns:
        Whether the forward and the backward ran.
    """
    key = describe_computation(model), tuple((one.path, type(one.frozen)) for one in replaced)
    if (outcome := _outcomes.get(key)) is None:
        markers: dict[nn.Module, Tensor] = {}
        watch = ReaderWatch(blocks)
        error = _run_forward(model, blocks, markers, watch)
        if error is not None:
            log.debug("gradients cannot be tried without weights: %s", _describe_cause(error))
            return False
        reached = {
            one.module_kind
            for one in replaced
            if (m := markers.get(one.frozen)) is not None and m.grad is not None
        }
        if () in watch.found.values():  # perhaps read by a block that was left out
            _run_forward(model, (), watch=watch)
        outcome = _remember_outcome(key, model, reached, watch.found)
    vars(model)["head_output_is_logits"] = outcome.head_is_last
    mark_readers(model, outcome.readers)
    for one in replaced:
        if isinstance(one.frozen, FrozenLinear):
            one.frozen.without_gradient = one.module_kind not in outcome.reached
    return True


def runs_with_mask(model: PreTrainedModel, blocks: Sequence[nn.Module], mask: Any) -> bool:
    """Return whether the forward of a row of ``PROBE_TOKENS`` tokens runs on fake tensors with
    ``attention_mask`` given as ``mask``."""
    masks = mask if isinstance(mask, dict) else {"": mask}
    kinds = tuple((name, m.dtype, str(m.tolist())) for name, m in masks.items() if m is not None)
    key = describe_computation(model), kinds
    if (outcome := _outcomes.get(key)) is None:
        if _run_forward(model, blocks, mask=mask) is not None:
            return False
        outcome = _remember_outcome(key, model, (), {})
    vars(model)["head_output_is_logits"] = outcome.head_is_last
    return True


@dataclass(frozen=True)
class _Outcome:
    """Of a forward that ran: kinds of linears with a gradient; logits are the head's output;
    readers of parameters outside of the blocks."""

    reached: frozenset[str]
    head_is_last: bool
    readers: FoundReaders


_outcomes: dict[object, _Outcome] = {}
"""Of this process, by model and inputs; a failure is diagnosed each time."""


def _remember_outcome(
    key: object, model: PreTrainedModel, reached: Iterable[str], readers: FoundReaders
) -> _Outcome:
    if len(_outcomes) >= 256:
        _outcomes.clear()
    _outcomes[key] = _Outcome(frozenset(reached), vars(model)["head_output_is_logits"], readers)
    return _outcomes[key]


def _run_forward(
    model: PreTrainedModel,
    alike: Sequence[nn.Module],
    markers: dict[nn.Module, Tensor] | None = None,
    watch: ReaderWatch | None = None,
    mask: Any = None,
) -> Exception | None:
    """Return the error of the forward or None; of like blocks in ``alike`` one is run.

    Args:
        markers: if not None, run the backward too and store the numbers added to the outputs of
            linears here.
        watch: of the forward.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    attention = model.config._attn_implementation
    try:
        if attention not in ON_ANY_DEVICE:
            model.config._attn_implementation = "eager"
        with restore_own_attributes(model), torch.set_grad_enabled(markers is not None):
            parameters = replace_with_fake_tensors(model, mode)
            fake_frozen_forwards(model, mode, markers)
            _run_each_kind_once(alike)
            model.eval()
            with mode, quiet_fake_tensors():
                ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
                inputs = {"input_ids": ids}
                if model.get_output_embeddings() is not None:
                    inputs["position_ids"] = torch.arange(PROBE_TOKENS)[None]
                if mask is not None:
                    inputs["attention_mask"] = mask
                with nullcontext() if watch is None else watch.watch_forward(model):
                    logits, head_is_last = _run_and_watch_head(model, inputs)
                if markers is not None:
                    logits.float().sum().backward()
            changed = sum(p._version > 0 for p in parameters)
        if changed:
            raise _ChangedWeightsError(f"its forward changes {changed} of its weights in place")
        vars(model)["head_output_is_logits"] = head_is_last
    except Exception as error:  # any error of a family's code
        return error
    finally:
        if attention not in ON_ANY_DEVICE:
            model.config._attn_implementation = attention
    return None


def _run_and_watch_head(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Return the logits, and whether they are the output of the output head, unchanged: Chameleon
    masks some of them in place."""
    outputs: list[tuple[Any, int]] = []
    head = model.get_output_embeddings()
    watch = None

    def note_output(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append((output, output._version))

    if isinstance(head, nn.Module):
        watch = head.register_forward_hook(note_output)
    try:
        logits = model(**inputs).logits
    finally:
        if watch is not None:
            watch.remove()
    is_last = len(outputs) == 1 and outputs[0][0] is logits
    return logits, is_last and outputs[0][1] == logits._version


@contextmanager
def restore_own_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules on exit."""
    before = [
        (m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules))
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, *tables in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, table in zip(("_parameters", "_buffers", "_modules"), tables, strict=True):
                own = module.__dict__[name]
                own.clear()
                own.update(table)


def _run_each_kind_once(blocks: Sequence[nn.Module]) -> None:
    outputs: dict[object, Any] = {}
    for block in blocks:
        block.forward = _run_first_of_kind(block.forward, block_kind(block), outputs)


def _run_first_of_kind(
    forward: Callable[..., Any], kind: object, outputs: dict[object, Any]
) -> Callable[..., Any]:
    def run_or_reuse(*args: Any, **kwargs: Any) -> Any:
        key = kind, torch.is_grad_enabled()  # HRM runs its layers without a graph first
        if key not in outputs:
            outputs[key] = forward(*args, **kwargs)
        return outputs[key]

    return run_or_reuse
