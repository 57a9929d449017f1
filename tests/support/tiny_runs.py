"""A run small enough for every test: a random Llama of two layers and eight short records."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_peft.app.commands import train as train_app
from dist_peft.core.config.io import parse_config
from dist_peft.core.world import World
from tests.support.saved_files import SavedFiles
from tests.support.tiny_models import CONFIGS, save_model


def save_words(directory: Path) -> None:
    """A tokenizer of 97 words, ``w0`` to ``w96``; w2 ends a text."""
    _word_files().write(directory)


@cache
def _word_files() -> SavedFiles:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="w2", bos_token="w1", pad_token="w0", unk_token="w3"
    )
    with tempfile.TemporaryDirectory() as directory:
        words.save_pretrained(directory)
        return SavedFiles.read(Path(directory))


def save_base(directory: Path) -> Path:
    save_model(CONFIGS["llama"], directory)
    save_words(directory)
    return directory


def save_records(path: Path, count: int = 8, words: int = 5) -> Path:
    lines = []
    for i in range(count):
        text = " ".join(f"w{4 + (7 * i + j) % 90}" for j in range(words))
        lines.append(json.dumps({"prompt": f"w{10 + i} ", "completion": text}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_tree(directory: Path, **changes: Any) -> dict[str, Any]:
    """A configuration whose files exist under ``directory``; ``section__key=value`` changes it."""
    tree: dict[str, Any] = {
        "base": {
            "path": str(save_base(directory / "base")),
            "compute_dtype": "float32",
            "quant": None,
        },
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [str(save_records(directory / "train.jsonl"))],
            "eval": [str(save_records(directory / "eval.jsonl", 3))],
            "seq_len": 16,
            "packing": False,
            "cache_dir": str(directory / "cache"),
        },
        "train": {
            "micro_batch": 1,
            "global_batch": 2,
            "lr": 1e-2,
            "steps": 3,
            "device": "cpu",
            "samples": 0,
        },
        "save": {"dir": str(directory / "run"), "every": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section] = {**tree.get(section, {}), name: value}
        else:
            tree[section] = value
    return tree


def save_config(directory: Path, tree: dict[str, Any]) -> Path:
    path = directory / "config.yaml"
    OmegaConf.save(OmegaConf.create(tree), path)
    return path


GPTQ: dict[str, Any] = {
    "kind": "int",
    "bits": 3,
    "group_size": 16,
    "solver": "gptq",
    "calibration_samples": 3,  # on 2 ranks one of them has one more
    "calibration_tokens": 24,
}


def train(tree: dict[str, Any]) -> int:
    """The command ``train`` in this process; its exit code."""
    return train_app.train_from_config(parse_config(tree), World())
