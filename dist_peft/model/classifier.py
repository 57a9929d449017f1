"""Sequence classification: the second head that a base can have (``base.head: classifier``).

``transformers`` puts it on encoders and on decoders::

    BERT       [CLS] a [SEP] b [SEP] -> blocks -> state of [CLS] -> pooler -> classifier -> logits
    RoBERTa    <s> a </s></s> b </s> -> blocks -> state of <s>   -> dense, tanh, out_proj
    ModernBERT [CLS] a [SEP] b [SEP] -> blocks -> [CLS] or mean  -> dense, norm, classifier
    Llama, ... <s> a b               -> blocks -> state of the last token -> score

The *head* is every module outside the model's trunk (``base_model``), and a pooler that the files
do not have. Most of its parameters are in no checkpoint and are *new*; the others, if the files
have them in the right shape, are initialized from the files. The head is always trainable
(``adapters.classifier_head.method``), the trunk is frozen, quantized and sharded as under a
language model's head.

Checkpoints of encoders come from the trunk alone (no ``bert.`` in front) or with another head
(``cls.*``, ``lm_head.*``); such tensors are ignored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dist_peft.core.errors import UserError
from dist_peft.store.format import TensorSpec

__all__ = [
    "KINDS",
    "MODELS",
    "ClassifierHead",
    "choose_pad_token_id",
    "classifier_config_keys",
    "count_unused_positions",
    "find_classifier_head",
    "is_encoder",
    "make_may_be_missing",
    "reads_token_types",
    "refuse_encoder",
    "select_used_and_new",
    "set_label_config",
    "set_pad_token",
]

MODELS: dict[str, Any] = {
    "lm": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
}
"""``base.head`` -> the class that builds it."""

KINDS = {"lm": "causal LM", "classifier": "classifier"}
"""``base.head`` -> its name in messages."""


@dataclass(frozen=True)
class ClassifierHead:
    """The classification head of a model.

    Attributes:
        labels: names of the classes, in the order of their ids.
        modules: path of each module that owns parameters of the head, in the model's order.
        new: full names of parameters that the base's files do not have.
    """

    labels: tuple[str, ...]
    modules: tuple[str, ...]
    new: tuple[str, ...]


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether attention is bidirectional: such a model predicts no next tokens."""
    decodes = getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes


def refuse_encoder(config: PretrainedConfig, path: str) -> None:
    """Refuse an encoder as a language model.

    Raises:
        UserError: ``config`` is an encoder's, which a language model's head does not fit.
    """
    if is_encoder(config):
        raise UserError(
            f"base.path {path} is an encoder ({config.model_type}), which predicts no next tokens; "
            "set base.head: classifier and give data of format: classification"
        )


def set_label_config(config: PretrainedConfig, labels: Sequence[str]) -> None:
    """Set the class labels in a model's configuration.

    Raises:
        UserError: an encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"base.head classifier: {config.model_type} has an encoder and a decoder; give an "
            "encoder (BERT, RoBERTa, ModernBERT, ...) or a decoder (Llama, Qwen, ...)"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def make_may_be_missing(
    model: PreTrainedModel, blocks: Sequence[nn.Module]
) -> Callable[[str], bool]:
    """Return a predicate on full names: whether the base's files may lack the parameter.

    Afterwards only unused tensors that look like a block's weight are worth a warning.

    Raises:
        UserError: layers that share weights (ALBERT), or a trunk that cannot be identified.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if model.base_model is model or count != len(blocks):
        raise UserError(
            f"base.head classifier: the structure of {type(model).__name__} is not known here "
            f"({len(blocks)} blocks found, config.json says {count} layers)"
        )
    path = next(n for n, m in model.base_model.named_modules() if m is blocks[0])
    inside = re.escape(path.rpartition(".")[0])
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, rf"^(?!.*\b{inside}\.\d)"}
    trunk = _trunk_prefix(model)
    return lambda name: not name.startswith(trunk) or name.startswith(f"{trunk}pooler.")


def _trunk_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of names inside the trunk."""
    return next(n for n, m in model.named_modules() if m is model.base_model) + "."


def find_classifier_head(
    model: PreTrainedModel, names: Mapping[str, str], labels: Sequence[str]
) -> ClassifierHead:
    """Return the head of ``model``; ``names`` maps its parameters to tensors of the files.

    Raises:
        UserError: a part of the head that owns parameters and has parts itself.
    """
    trunk = _trunk_prefix(model)
    parameters = dict(model.named_parameters())
    new = [name for name in parameters if name not in names]
    learns = [n for n in parameters if n in new or not n.startswith(trunk)]
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in learns))
    for path in modules:
        if any(True for _ in model.get_submodule(path).children()):
            raise UserError(
                f"base.head classifier: {path} of {type(model).__name__} has parameters and parts; "
                "such a head is not known here"
            )
    return ClassifierHead(tuple(labels), modules, tuple(new))


def count_unused_positions(model: nn.Module) -> int:
    """Return the number of position embeddings without a token: RoBERTa starts after the padding
    id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def select_used_and_new(
    model: nn.Module, names: dict[str, str], tensors: Mapping[str, TensorSpec], head: ClassifierHead
) -> dict[str, TensorSpec]:
    """Return the used tensors of the files and the new ones of the head (``Skeleton.tensors``)."""
    used = set(names.values())
    found = {name: spec for name, spec in tensors.items() if name in used}
    for name in head.new:
        shape = tuple(model.get_parameter(name).shape)
        found[name] = TensorSpec(name, torch.float32, shape)
    return found


def classifier_config_keys(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return keys of ``config.json`` that make ``transformers`` load a classifier as trained."""
    config = model.config
    return {
        "architectures": [type(model).__name__],
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
        "pad_token_id": choose_pad_token_id(tokenizer),
    }


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a decoder's padding token: it classifies at the last token that is not padding."""
    model.config.get_text_config().pad_token_id = choose_pad_token_id(tokenizer)


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token, or of the end-of-text token where there is none."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in ids if i is not None))


def reads_token_types(model: nn.Module) -> bool:
    """Return whether token type embeddings mark the two texts of a pair, as in BERT."""
    types: int = getattr(model.config, "type_vocab_size", 0)
    return types > 1
