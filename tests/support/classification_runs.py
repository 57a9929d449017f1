"""Runs of a classifier: tiny random encoders and decoders, and records that can be told apart."""

from pathlib import Path
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import CONFIGS, ENCODERS, MIXTURES, save_model
from tests.support.tiny_runs import tiny_tree

LABELS = ["no", "yes"]
TEMPLATES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"),
    "modernbert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "llama": ("[CLS] $A", "[CLS] $A $B:1"),
    "mixtral": ("[CLS] $A", "[CLS] $A $B:1"),
}
"""How each family's tokenizer writes a text, and a pair."""


def save_classifier_base(directory: Path, family: str, auto: Any = None) -> Path:
    """An encoder or a decoder, random, with a tokenizer of 97 words.

    Args:
        auto: the kind of model that is saved; default: an encoder's trunk, a causal LM.
    """
    if family in ENCODERS:
        save_model(ENCODERS[family], directory, auto=auto or tf.AutoModel)
    else:
        config = (CONFIGS | MIXTURES)[family]
        save_model(config, directory, auto=auto or tf.AutoModelForCausalLM)
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    if family == "roberta":
        special |= {"[PAD]": 1, "[CLS]": 0}
    words = {f"w{i}": i for i in range(4, 97)}
    inner = Tokenizer(models.WordLevel({**special, **words}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = TEMPLATES[family.partition("-")[0]]
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(special.items())
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(directory)
    return directory


def save_pairs(path: Path, count: int = 12, labels: list[str] | None = None) -> Path:
    """The label is whether the second text begins with the word that the first one begins with."""
    labels = labels or LABELS
    lines = ["id\tfirst\tsecond\tanswer"]
    for i in range(count):
        same = i % 2
        a = [f"w{10 + (7 * i + j) % 80}" for j in range(2 + i % 4)]
        b = [a[0] if same else "w9", *a[1:]]
        lines.append(f"{i}\t{' '.join(a)}\t{' '.join(b)}\t{labels[same]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def source(path: Path, **changes: Any) -> dict[str, Any]:
    columns = {"text": "first", "text_pair": "second", "label": "answer"}
    fields = {"format": "classification", "columns": columns, "labels": LABELS}
    return {"path": str(path), **fields, **changes}


def classifying_tree(directory: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """See ``tiny_tree``: a classifier on ``base``."""
    tree = tiny_tree(directory)
    tree["base"] |= {"path": str(base), "head": "classifier"}
    train, held_out = save_pairs(directory / "pairs.tsv"), save_pairs(directory / "held.tsv", 5)
    del tree["data"]["packing"]
    tree["data"] |= {"train": [source(train)], "eval": [source(held_out)], "seq_len": 24}
    tree["train"] |= {"micro_batch": 2, "global_batch": 4}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return tree


ADVERSARIAL = {"weight": 0.7, "gamma": 4.0, "hidden_size": 5}


def domain_tree(directory: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """Twelve labelled rows of one domain, seven rows of another without labels."""
    tree = classifying_tree(directory, base)
    (labelled,) = tree["data"]["train"]
    other = save_pairs(directory / "target.tsv", 7)
    text = [line.split("\t")[1:3] for line in other.read_text().splitlines()]
    other.write_text("\n".join("\t".join(row) for row in text) + "\n")  # no label column
    columns = {k: v for k, v in labelled["columns"].items() if k != "label"}
    target = {"path": str(other), "format": "classification", "columns": columns, "domain": "b"}
    tree["data"]["train"] = [{**labelled, "domain": "a"}, target]
    tree["train"] |= {"domain_adversarial": ADVERSARIAL, "global_batch": 6, "steps": 3}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return tree
