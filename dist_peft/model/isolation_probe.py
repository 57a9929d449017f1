"""Whether packed documents see each other, tried in float32 before any weight is loaded.

Isolation is a property of a family's code and of its masks, not of its weights. In half precision
rounding hides small leaks (mixtures of experts are allowed 5 % of the largest logit for it), and a
loaded model is too large for float32. So the forward runs here with weights of its own::

    linears                x [.., in] -> x A B, A [in, 32] and B [32, out] random, shared by shape
    output head            the same with out = 64: what follows it is no attention
    experts                a function of each token alone, which is what routed experts are
    other parameters       random; from 1 MiB on a view whose rows overlap, rows i and i + 1 shifted
                           by one number

That is some MiB whatever the model is. The attention, convolutions, scans, rotary angles and
masks are the family's own, with the widths, heads and window lengths of its config. Of the layers,
the first ones run, until each kind of layer has run; two at least.

Rows longer than ``_LONGEST`` would take a CPU minutes. Where the config names a length above that
(``config_switches``: windows, chunks, longrope), a second model of the family is built, of the same
config with these lengths shortened to a few dozen tokens, and tried on both sides of each.

What it does not see: attention implementations that are for GPUs or half precision only (``sdpa``
runs instead), and adapters. ``documents_are_isolated`` looks at the loaded model for these.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.model.block_kinds import block_kind
from dist_peft.model.config_switches import list_switches, shorten_switches
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.expert_kinds import describe_experts, find_expert_modules
from dist_peft.model.expert_variants import make_stand_in
from dist_peft.model.experts import FrozenExperts
from dist_peft.model.forward_probe import ON_ANY_DEVICE, restore_own_attributes
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.meta_device import EmptyOnMeta
from dist_peft.model.rotary import set_rotary_by_document

__all__ = [
    "is_isolated_beyond_switches",
    "is_isolated_in_float32",
    "layers_to_run",
    "refuse_leaks",
]

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_RANK = 32
_LOGITS = 64
_LONGEST = 2304
"""Tokens of a row: attention to many more takes a CPU minutes."""

_MARGIN = 9
"""Tokens that a row has more than the switch that is tried: one, and a short document."""

_OVERLAP_FROM = 1 << 18
"""Numbers of a parameter from which on its rows overlap: 1 MiB."""


def refuse_leaks(model: PreTrainedModel, blocks: Sequence[nn.Module], longest: int) -> None:
    """Refuse a model whose packed documents see each other in float32, in rows of up to ``longest``
    tokens. Log a warning if lengths that the config names cannot be tried.

    Raises:
        UserError: packed documents see each other.
    """
    if is_isolated_in_float32(model, blocks, longest) is False:
        raise UserError(
            f"a {model.config.model_type} model lets packed documents see each other (seen in "
            "float32, with random weights); set data.packing: false"
        )
    longer = [
        switch
        for switch in list_switches(model.config)
        if _LONGEST < switch.length + _MARGIN <= longest
    ]
    if not longer:
        return
    named = ", ".join(f"{switch.key}: {switch.length}" for switch in longer)
    limit = longer[0].length
    isolated = is_isolated_beyond_switches(model, longest)
    if isolated is False:
        raise UserError(
            f"a {model.config.model_type} model lets packed documents see each other in rows of "
            f"more than {limit} tokens ({named} in config.json; seen in float32, with random "
            f"weights and that length shortened); set data.packing: false, or data.seq_len to "
            f"{limit} at most"
        )
    if isolated is None:
        log.warning(
            "it could not be tried whether packed documents see each other in rows of more than %d "
            "tokens (%s in config.json): with data.packing: false, or with data.seq_len of %d at "
            "most, they do not",
            limit,
            named,
            limit,
            extra=ONCE,
        )


def is_isolated_in_float32(
    model: PreTrainedModel, blocks: Sequence[nn.Module], longest: int = 0
) -> bool | None:
    """``documents_are_isolated`` of a model without weights, in float32 on the CPU.

    Lengths on both sides of each switch that the config names are tried.
    The model is as before afterwards.

    Args:
        model: parameters on meta, linears and experts frozen or not, no adapter, not sharded.
        blocks: its layers.
        longest: tokens of the longest row to come; lengths that do not fit are left out, and
            those that do not fit into ``_LONGEST``.

    Returns:
        None: the family's code does not run this way, and nothing is known.
    """
    config = model.config
    attention, dtype = config._attn_implementation, config.dtype
    try:
        if attention not in ON_ANY_DEVICE:
            config._attn_implementation = "sdpa"
        config.dtype = torch.float32
        with restore_own_attributes(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _fill_with_random_numbers(model)
            _keep_first_layers(model, blocks)
            model.eval()
            longest = min(longest, _LONGEST)
            lengths = [switch.length for switch in list_switches(config)]
            return documents_are_isolated(model, _CPU, longest, lengths)
    except Exception as error:  # of any family's code
        log.info(
            "packed documents cannot be tried in float32 without weights, only on the loaded "
            "model (%s: %s)",
            type(error).__name__,
            error,
        )
        return None
    finally:
        config._attn_implementation, config.dtype = attention, dtype


def is_isolated_beyond_switches(model: PreTrainedModel, longest: int) -> bool | None:
    """``is_isolated_in_float32`` of a model of the same config but for the lengths that it names:
    those that fit into ``longest`` are shortened.

    Takes a few forwards of less than 100 tokens, whatever the lengths are.

    Returns:
        True where there is no such length; None where the family's code does not run this way, and
        nothing is known.
    """
    config, lengths = shorten_switches(model.config, longest - _MARGIN)
    if not lengths:
        return True
    if config._attn_implementation not in ON_ANY_DEVICE:
        config._attn_implementation = "sdpa"
    config.dtype = torch.float32
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with EmptyOnMeta():
                small: PreTrainedModel = type(model)(config)
            set_rotary_by_document(small)
            blocks = find_decoder_blocks(small)
            with suppress(UserError):  # experts of another kind run as they are
                for experts in find_expert_modules(blocks):
                    kind = describe_experts(experts)
                    assert kind is not None
                    width = kind.find_stack_shape(experts, kind.names[-1])[1]
                    vars(experts)["forward"] = make_stand_in(kind.form, width)
            _fill_with_random_numbers(small)
            _keep_first_layers(small, blocks)
            small.eval()
            if not documents_are_isolated(small, _CPU):
                return None  # though the model itself is: not the same model
            if documents_are_isolated(small, _CPU, lengths[-1] + _MARGIN, lengths):
                return True
            return False if _has_finite_logits(small, lengths[-1] + 1) else None
    except Exception as error:  # of any family's code
        log.info("no model with shorter switches (%s: %s)", type(error).__name__, error)
        return None


@torch.no_grad()
def _has_finite_logits(model: PreTrainedModel, length: int) -> bool:
    places = torch.arange(length).unsqueeze(0)
    logits: Tensor = model(input_ids=places % 3, position_ids=places, use_cache=False).logits
    return bool(logits.isfinite().all())


def layers_to_run(blocks: Sequence[nn.Module], types: Sequence[str] = ()) -> int:
    """Length of the shortest beginning of ``blocks`` with every kind in it, two at least.

    A beginning, because code asks ``config.layer_types`` by a layer's number.
    """
    kinds = [
        (block_kind(block), types[number] if number < len(types) else "")
        for number, block in enumerate(blocks)
    ]
    return min(len(kinds), max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))


def _keep_first_layers(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    left_out = set(blocks[layers_to_run(blocks, types) :])
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and left_out & set(module):
            # layers alone: a list of something else may be asked for by number
            for name, child in list(module._modules.items()):
                if child in left_out:
                    del module._modules[name]


def _fill_with_random_numbers(model: PreTrainedModel) -> None:
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, FrozenExperts):
            vars(module)["forward"] = make_stand_in(module.form, module.out_features)
        elif isinstance(module, FrozenEmbedding):
            vars(module)["forward"] = _look_up_random_rows(module)
        elif isinstance(module, FrozenLinear) or _is_plain_linear(module):
            shape = (module.in_features, _LOGITS if module is head else module.out_features)
            if shape not in pairs:
                rows, columns = torch.randn(shape[0], _RANK), torch.randn(_RANK, shape[1])
                pairs[shape] = rows / shape[0] ** 0.5, columns / _RANK**0.5
            vars(module)["forward"] = _low_rank(*pairs[shape])
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    numbers = _random_parameter(name, parameter)
                    known[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()


def _look_up_random_rows(embedding: FrozenEmbedding) -> Callable[[Tensor], Tensor]:
    shape = embedding.num_embeddings, embedding.embedding_dim
    table = _random_parameter("weight", torch.empty(shape, device="meta"))
    return lambda ids: embedding.finish_lookup(ids, table[ids.flatten()])


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its forward is Linear's: Llama 4's router, a subclass, returns two tensors."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _random_parameter(name: str, parameter: Tensor) -> Tensor:
    shape, floating = parameter.shape, parameter.is_floating_point()
    if not floating:  # packed bytes, which nothing reads: their linears answer without
        return torch.empty(shape, dtype=parameter.dtype, device="meta")
    if parameter.numel() >= _OVERLAP_FROM and parameter.dim() > 1:
        strides = [1] * parameter.dim()
        numbers = torch.randn(sum(shape)) / shape[-1] ** 0.5
        return numbers.as_strided(shape, strides)
    numbers = 0.2 * torch.randn(shape)
    return 1 + numbers if parameter.dim() == 1 and name == "weight" else numbers  # of norms


def _low_rank(rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x @ rows) @ columns
