"""Any ``transformers`` causal LM or classifier on ``meta``, its linears and experts packed.

No weight is allocated: parameters live on the ``meta`` device until the engine has assigned rows to
ranks. Buffers are another matter. Non-persistent ones (rotary frequencies, Gemma's embedding scale)
are in no checkpoint and are lost for good if they are built on ``meta``, so the model is built
under a function mode that redirects only the allocation of *uninitialized* memory (``torch.empty``,
which every ``nn.Linear`` and ``nn.Embedding`` weight comes from) and leaves arithmetic such as
``torch.arange`` alone. Buffers thus come out real, computed by the model's own code, whatever the
family; the norms' small parameters come out real too and are moved to ``meta`` afterwards.

The mapping to checkpoint tensors (found by ``model.naming``) is attached here, too: every module
that owns parameters gets ``checkpoint_names``, a dict from its own parameter's name to the tensor's
name in the files, and stacks of experts get ``pieces``. Both stay right when an adapter later moves
the module one level down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.model import classifier
from dist_peft.model.config_sizes import refuse_impossible_sizes
from dist_peft.model.decoder_blocks import find_decoder_blocks
from dist_peft.model.document_attention import (
    build_document_masks,
    select_document_attention,
)
from dist_peft.model.expert_kinds import find_expert_modules, find_router_linears
from dist_peft.model.experts import ExpertStack
from dist_peft.model.float32_tensors import find_wider_dtypes, set_parameter_dtypes
from dist_peft.model.forward_probe import PROBE_TOKENS, probe_forward, runs_with_mask
from dist_peft.model.freezing import (
    check_base_is_packed,
    check_embeddings_are_packed,
    freeze_embeddings,
    freeze_experts,
    freeze_linears,
)
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenLinear, FrozenWeight
from dist_peft.model.gptq_factors import use_gptq_factors
from dist_peft.model.hub import REFUSALS, format_library_error, read_json_object, refuse_hub_kernels
from dist_peft.model.model_class import build_on_meta
from dist_peft.model.naming import find_tensor_names
from dist_peft.model.parameter_readers import is_never_read
from dist_peft.model.prequantized.base import (
    PrequantizedBase,
    check_stated_quant,
    open_prequantized,
)
from dist_peft.model.rotary import set_rotary_by_document
from dist_peft.model.stated_device import state_dtype
from dist_peft.model.text_inputs import refuse_other_inputs
from dist_peft.model.text_model import make_tower_predicate
from dist_peft.model.tied_weights import read_untied_config_keys
from dist_peft.model.weight_probe import find_externally_read_linears, refuse_unsupported_blocks
from dist_peft.quant.codec import RawCodec, make_codec
from dist_peft.store.format import TensorSpec
from dist_peft.store.index import SafetensorsIndex

__all__ = [
    "Skeleton",
    "build_skeleton",
    "parse_torch_dtype",
]


@dataclass
class Skeleton:
    """A model without weights.

    Attributes:
        model: the ``transformers`` model; parameters on ``meta``, buffers real and on the CPU.
        blocks: its layers, first to last (the unit of sharding and recomputation).
        index: index of the base's files.
        tied: the output head shares the input embedding's weight.
        tensors: the model's tensors in the order of the files: those of ``index``, and for each
            weight that a prequantized directory stores as several tensors, its spec [out, in] as
            float32. A classifier's are the used ones only, and after them the new ones of its head,
            as float32 and under the model's names.
        prequantized: format of a prequantized directory; None: weights are encoded by
            ``base.quant`` while they are read.
        head: of a classifier; trainable.
        wide: tensors of ``tensors`` that are written in a wider type than the rest, and the type
            (``model.float32_tensors``).
        renamed: tensors that are written under another name than they are stored with.
        settings: keys of ``config.json`` that a written model has and the base has not.
    """

    model: PreTrainedModel
    blocks: list[nn.Module]
    index: SafetensorsIndex
    tied: bool
    tensors: dict[str, TensorSpec]
    prequantized: PrequantizedBase | None
    head: classifier.ClassifierHead | None = None
    wide: dict[str, torch.dtype] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the input embedding."""
        return int(self.model_config.get_text_config().vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Longest document that the base supports; None: no limit, or none is known."""
        known = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        if known is None or known < 0:  # XLNet says -1
            return None
        return int(known) - classifier.count_unused_positions(self.model)

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions beyond ``positions`` have no embedding; rotary ones extrapolate."""
        rotary = getattr(self.model_config.get_text_config(), "rope_parameters", None)
        return self.max_positions is not None and not rotary


def parse_torch_dtype(name: str) -> torch.dtype:
    """Return ``torch.bfloat16`` for ``bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def build_skeleton(base: BaseConfig, directory: Path, labels: Sequence[str] = ()) -> Skeleton:
    """Build the model of ``directory`` without weights.

    Args:
        labels: with ``base.head: classifier`` the names of the classes.

    Raises:
        UserError: no or unreadable ``config.json``, a model type ``transformers`` does not know
            or that has no such head, checkpoint tensors that do not fit the model; a prequantized
            directory that is not read or that ``base.quant`` contradicts.
    """
    index = SafetensorsIndex.open(directory)
    dtype = parse_torch_dtype(base.compute_dtype)
    config = _read_model_config(base, directory)
    packed = open_prequantized(directory, index)
    if packed is not None:
        check_stated_quant(base, packed, directory)
    if base.head == "classifier":
        classifier.set_label_config(config, labels)
    else:
        classifier.refuse_encoder(config, base.path)
    model = build_on_meta(config, base, dtype)
    if base.head == "lm":
        refuse_other_inputs(model, base.path)
    set_parameter_dtypes(model, dtype)
    state_dtype(model)
    blocks = find_decoder_blocks(model)
    refuse_unsupported_blocks(model, blocks, base.path)
    may_lack = (
        make_tower_predicate(model)
        if base.head == "lm"
        else classifier.make_may_be_missing(model, blocks)
    )
    experts = find_expert_modules(blocks)
    names = find_tensor_names(model, index, packed, experts, may_lack)
    head = (
        None
        if base.head == "lm"
        else classifier.find_classifier_head(model, names.found_names, labels)
    )
    tied = _is_head_tied(model)
    codec = make_codec(base.quant, dtype) if packed is None else RawCodec(dtype)
    learning, routers = head.modules if head else (), find_router_linears(model, experts)
    plain = routers | find_externally_read_linears(model)
    packs_embeddings = base.quant is not None and base.quant.embeddings
    replaced = []
    if packs_embeddings:
        replaced += freeze_embeddings(model, codec, dtype, plain, base.path)
    replaced += freeze_linears(model, blocks, names, codec, dtype, packed, tied, learning, plain)
    replaced += freeze_experts(model, experts, names, codec, packed)
    probe_forward(model, blocks, replaced, base.path)
    if packs_embeddings:
        check_embeddings_are_packed(model, base.path)
    if base.quant is not None:
        check_base_is_packed(model, blocks, base.path)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, FrozenWeight) and parameter.device.type != "meta":
                meta = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
                module.register_parameter(name, meta)
    model.requires_grad_(False)
    tensors = _select_used_tensors(model, names.tensors, index, packed)
    wide = find_wider_dtypes(model, names.tensors, tensors, dtype)
    if head is not None:
        tensors = classifier.select_used_and_new(model, names.found_names, tensors, head)
    _attach_tensor_names(model, names.tensors, index, tensors)
    use_gptq_factors(model, base.quant, directory)
    if base.head == "lm":
        _refuse_unnamed_linears(model, base.path)
    set_rotary_by_document(model)
    if base.head == "lm" and base.attention == "auto":
        _use_document_attention(model, blocks)
    model.eval()  # the frozen base computes without dropout; adapters have their own
    settings = {} if tied else _untied_config_keys(model, directory)
    return Skeleton(
        model, blocks, index, tied, tensors, packed, head, wide, names.renamed, settings
    )


def _use_document_attention(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Let a model compute attention by document if its code passes boundaries through."""
    before = model.config._attn_implementation
    if select_document_attention(model):
        mask = build_document_masks(model, torch.arange(PROBE_TOKENS)[None], is_packed=False)
        if not runs_with_mask(model, blocks, mask):
            model.config._attn_implementation = before


def _read_model_config(base: BaseConfig, directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; base.path must be a Hugging Face model")
    described = read_json_object(directory / "config.json")
    if not base.trust_remote_code:
        refuse_hub_kernels(described, directory / "config.json")
    refuse_impossible_sizes(described, directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=base.trust_remote_code)
        config.get_text_config()  # raises where there are several (MusicGen)
    except REFUSALS as error:
        raise UserError(
            f"cannot use {directory / 'config.json'}: {format_library_error(error)}"
        ) from None
    refuse_impossible_sizes(config, directory / "config.json")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers must not apply it
    config.use_cache = False
    return config


def _is_head_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _untied_config_keys(model: PreTrainedModel, directory: Path) -> Mapping[str, Any]:
    """Return ``config.json`` keys to write where the base's wrongly ties its head."""
    claimed = getattr(model.config, "tie_word_embeddings", False) and model._tied_weights_keys
    if not claimed or model.get_output_embeddings() is None:
        return {}
    return read_untied_config_keys(directory)


def _select_used_tensors(
    model: nn.Module,
    names: dict[str, str],
    index: SafetensorsIndex,
    packed: PrequantizedBase | None,
) -> dict[str, TensorSpec]:
    """Return ``Skeleton.tensors``; packed weights that the model does not use are left out.

    Raises:
        UserError: a packed tensor is not a linear of a block.
    """
    if packed is None:
        return dict(index.tensors)
    shapes: dict[str, tuple[int, ...]] = {
        names[f"{path}.weight"]: (m.out_features, m.in_features)
        for path, m in model.named_modules()
        if isinstance(m, FrozenLinear) and m.stored is not None
    }
    for module in model.modules():
        if isinstance(module, ExpertStack) and module.stored is not None:
            shapes |= module.list_piece_shapes()
    used, tensors = set(names.values()), dict[str, TensorSpec]()
    for name, info in packed.tensors.items():
        if info is not None:
            tensors[name] = info
        elif name in shapes:
            tensors[name] = TensorSpec(name, torch.float32, shapes[name])
        elif name in used:
            raise UserError(
                f"{index.path} has {name} quantized ({packed.format_label}), which is no "
                "linear of a "
                "block: output heads, embeddings and other kinds of layers are read unquantized "
                "only; quantize without it, or give the unquantized base"
            )
    return tensors


def _refuse_unnamed_linears(model: PreTrainedModel, path: str) -> None:
    """Refuse a model with parameters that have no tensor in the files.

    Raises:
        UserError: names the first such parameter.
    """
    seen: set[int] = set()
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, FrozenWeight) and name == "packed"
            unnamed = not packed and name not in module.checkpoint_names
            if id(parameter) not in seen and unnamed and not is_never_read(module, name):
                raise UserError(
                    f"base.path {path} of type {model.config.model_type!r} is not supported: "
                    f"{owner}.{name} has no tensor of its own in the files, and the parameter it "
                    "shares one with in transformers is not shared here"
                )
            seen.add(id(parameter))


def _attach_tensor_names(
    model: nn.Module,
    names: dict[str, str],
    index: SafetensorsIndex,
    tensors: Mapping[str, TensorSpec],
) -> None:
    sources: dict[int, str] = {}
    others: list[tuple[str, FrozenWeight]] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own: dict[str, str] = {}
        for name, parameter in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            packs = isinstance(module, FrozenLinear | FrozenEmbedding) and name == "packed"
            full = prefix + ("weight" if packs else name)
            if full in names:
                own[name] = names[full]
            elif packs and isinstance(module, FrozenLinear) and module.pieces:
                module.source = module.pieces[0].name
            elif packs:  # perhaps tied to another
                others.append((full, module))
            elif isinstance(module, FrozenLinear) and not is_never_read(module, name):
                raise _no_tensor_error(full, index)
            if packs and name in own:
                sources[id(parameter)] = module.source = own[name]
        pieces = module.pieces if isinstance(module, FrozenWeight) else ()
        whole = {n for n, b in module.named_buffers(recurse=False) if not b.is_floating_point()}
        numbers = [source for name, source in own.items() if name not in whole]
        for source in [*numbers, *(piece.name for piece in pieces)]:
            if not tensors[source].dtype.is_floating_point:
                raise UserError(
                    f"tensor {source} in {index.tensors[source].file} has type "
                    f"{index.tensors[source].dtype}, not a floating-point type: this base is "
                    "already quantized or is no model; give the unquantized base"
                )
        module.checkpoint_names = own
    for full, frozen in others:
        if id(frozen.packed) in sources:
            frozen.source = sources[id(frozen.packed)]
        elif not is_never_read(frozen, "packed"):
            raise _no_tensor_error(full, index)


def _no_tensor_error(name: str, index: SafetensorsIndex) -> UserError:
    return UserError(f"no tensor for {name} in {index.path}")
