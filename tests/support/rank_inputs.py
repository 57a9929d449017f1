"""Ranks whose configuration or inputs differ."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

Tree = dict[str, Any]


def changed(tree: Tree, key: str, value: object) -> Tree:
    section, _, name = key.partition(".")
    return {**tree, section: {**tree.get(section, {}), name: value} if name else value}


def other_inputs(tree: Tree, directory: Path) -> dict[str, tuple[Tree, str]]:
    """What rank 1 reads in another place, and how it is called; all of the same sizes."""
    directory.mkdir()
    base = Path(tree["base"]["path"])
    records = Path(tree["data"]["train"][0]).read_text().splitlines()

    def copied(name: str) -> Path:
        return Path(shutil.copytree(base, directory / name))

    weights = copied("weights") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    words = copied("words") / "tokenizer.json"
    vocabulary = json.loads(words.read_text())
    table = vocabulary["model"]["vocab"]
    table["w95"], table["w96"] = table["w96"], table["w95"]  # in no record
    words.write_text(json.dumps(vocabulary))
    template = copied("template") / "chat_template.jinja"
    template.write_text("{{ messages }}")
    turned = directory / "train.jsonl"
    turned.write_text("\n".join(reversed(records)) + "\n")
    return {
        "data": (changed(tree, "data.train", [str(turned)]), "contents of data.train is"),
        "weights": (changed(tree, "base.path", str(weights.parent)), "contents of base.path is"),
        "tokenizer": (changed(tree, "base.path", str(words.parent)), "tokenizer of base.path is"),
        "template": (
            changed(tree, "base.path", str(template.parent)),
            'chat template of base.path is "none" on rank 0',
        ),
    }
