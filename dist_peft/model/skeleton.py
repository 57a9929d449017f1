"""Any dense ``transformers`` causal LM on ``meta``, with its linears replaced by ``FrozenLinear``.

No weight is allocated: parameters live on the ``meta`` device until the engine has decided who
keeps which rows. Buffers are another matter. Non-persistent ones (rotary frequencies, Gemma's
embedding scale) are in no checkpoint and are lost for good if they are built on ``meta``, so the
model is built under a function mode that redirects only the allocation of *uninitialized* memory
(``torch.empty``, which every ``nn.Linear`` and ``nn.Embedding`` weight comes from) and leaves
arithmetic such as ``torch.arange`` alone. Buffers thus come out real, computed by the model's own
code, whatever the family; the norms' small parameters come out real too and are moved to ``meta``
afterwards.

Where checkpoint tensors go is decided here as well: every module that owns parameters gets
``checkpoint_names``, a dict from its own parameter's name to the tensor's name in the files. It
stays right when an adapter later moves the module one level down.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from dist_peft.core.config import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.model.frozen_linear import FrozenLinear
from dist_peft.model.hub import REFUSALS, read_json_object, reason
from dist_peft.quant.codec import RawCodec, make_codec
from dist_peft.store.index import SafetensorsIndex

__all__ = ["Skeleton", "build_skeleton", "torch_dtype"]

log = logging.getLogger("dist_peft")


@dataclass
class Skeleton:
    """A model without weights.

    Attributes:
        model: the ``transformers`` model; parameters on ``meta``, buffers real and on the CPU.
        blocks: its decoder layers, first to last (the unit of sharding and recomputation).
        index: the tensors of the base's files.
        tied: the output head shares the input embedding's weight.
    """

    model: PreTrainedModel
    blocks: list[nn.Module]
    index: SafetensorsIndex
    tied: bool

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """The longest document that the base was made for; None: no limit is known."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def positions_are_learned(self) -> bool:
        """Beyond ``positions`` there is nothing, where rotary embeddings go on."""
        rotary = getattr(self.config.get_text_config(), "rope_parameters", None)
        return self.positions is not None and not rotary


class _EmptyOnMeta(TorchFunctionMode):
    """Redirects allocations of uninitialized memory to ``meta``; everything else runs as is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16`` -> ``torch.bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def build_skeleton(base: BaseConfig, directory: Path) -> Skeleton:
    """Build the model of ``directory`` without weights.

    Raises:
        UserError: no or unreadable ``config.json``, a model type ``transformers`` does not know
            or that is no causal LM, checkpoint tensors that do not fit the model.
    """
    index = SafetensorsIndex.open(directory)
    dtype = torch_dtype(base.compute_dtype)
    model = _build_meta(_read_config(base, directory), base, dtype)
    blocks = _find_blocks(model)
    names = _checkpoint_names(model, index)
    tied = _is_tied(model)
    codec = make_codec(base.quant, dtype)
    _freeze_linears(model, blocks, codec, RawCodec(dtype), dtype, tied)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, FrozenLinear) and parameter.device.type != "meta":
                meta = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
                module.register_parameter(name, meta)
    _attach_names(model, names, index)
    model.requires_grad_(False)
    model.eval()  # the frozen base computes without dropout; adapters have their own
    return Skeleton(model, blocks, index, tied)


def _read_config(base: BaseConfig, directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; base.path must be a Hugging Face model")
    read_json_object(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=base.trust_remote_code)
    except REFUSALS as error:
        raise UserError(f"cannot use {directory / 'config.json'}: {reason(error)}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{directory} is already quantized ({config.quantization_config}); "
            "give the unquantized base: it is quantized while it is read"
        )
    config.use_cache = False
    return config


def _build_meta(config: PretrainedConfig, base: BaseConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _EmptyOnMeta():
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=None if base.attention == "auto" else base.attention,
                trust_remote_code=base.trust_remote_code,
            )
    except REFUSALS as error:
        raise UserError(
            f"transformers cannot build a causal LM of type {config.model_type!r} "
            f"with base.attention={base.attention!r}: {reason(error)}"
        ) from None


def _find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the longest ``ModuleList`` of modules of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    uniform = [m for m in lists if len({type(child) for child in m}) == 1]
    if not uniform:
        raise UserError(
            f"no list of decoder layers found in {type(model).__name__}; "
            "this model type is not supported"
        )

    def depth(index: int) -> int:
        return sum(1 for _ in uniform[index].modules())

    return list(uniform[max(range(len(uniform)), key=depth)])


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _freeze_linears(
    model: nn.Module, blocks: list[nn.Module], codec: Any, raw: Any, dtype: torch.dtype, tied: bool
) -> None:
    """Inside the blocks linears take the base's codec; an untied head stays unquantized."""
    in_blocks = {id(m) for block in blocks for m in block.modules()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            inside = id(child) in in_blocks
            if not inside and tied:
                continue  # shares the embedding's parameter, which is no linear's
            frozen = FrozenLinear(
                child.in_features,
                child.out_features,
                codec if inside else raw,
                bias=child.bias is not None,
                bias_dtype=dtype,
                source="",
                device="meta",
            )
            frozen.is_head = not inside
            setattr(parent, name, frozen)


def _checkpoint_names(model: PreTrainedModel, index: SafetensorsIndex) -> dict[str, str]:
    """Parameter or persistent buffer -> tensor in the files.

    Some families were renamed after their checkpoints were written (``transformers`` knows how),
    and some checkpoints were saved from the headless model, without the leading ``model.``.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    in_files = {apply_renamings(name, renamings): name for name in index.tensors}
    prefix = model.base_model_prefix + "."
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    names, absent = {}, []
    for name in [*dict(model.named_parameters()), *buffers]:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in in_files:
                names[name] = in_files[candidate]
                break
        else:
            if name not in buffers:  # a buffer keeps the value that the model computed for it
                absent.append(name)
    if absent:
        raise UserError(
            f"{index.path} lacks {len(absent)} tensors of a {type(model).__name__}, "
            f"such as {absent[0]}; is the download complete?"
        )
    _warn_of_unused(model, index, set(names.values()))
    for name, source in names.items():
        shape, found = tuple(model.state_dict()[name].shape), index.tensors[source].shape
        if shape != found:
            raise UserError(
                f"tensor {source} has shape {list(found)} in the files but config.json asks "
                f"for {list(shape)}"
            )
    return names


def _warn_of_unused(model: PreTrainedModel, index: SafetensorsIndex, used: set[str]) -> None:
    """Matrices that no parameter takes: a config.json of fewer layers would drop them silently."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *(model._tied_weights_keys or ())]
    unused = [
        name
        for name, info in index.tensors.items()
        if name not in used
        and len(info.shape) == 2
        and info.dtype.is_floating_point
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if unused:
        log.warning(
            "%s has %d weights that a %s of this config.json does not use, such as %s",
            index.path,
            len(unused),
            type(model).__name__,
            unused[0],
            extra=ONCE,
        )


def _attach_names(model: nn.Module, names: dict[str, str], index: SafetensorsIndex) -> None:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own: dict[str, str] = {}
        for name, _ in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            full = prefix + (
                "weight" if isinstance(module, FrozenLinear) and name == "packed" else name
            )
            if full in names:
                own[name] = names[full]
            elif isinstance(module, FrozenLinear):
                raise UserError(f"no tensor for {full} in {index.path}")
        for source in own.values():
            if not index.tensors[source].dtype.is_floating_point:
                raise UserError(
                    f"tensor {source} in {index.tensors[source].file} has type "
                    f"{index.tensors[source].dtype}, not a floating-point type: this base is "
                    "already quantized or is no model; give the unquantized base"
                )
        module.checkpoint_names = own
        if isinstance(module, FrozenLinear):
            module.source = own["packed"]
