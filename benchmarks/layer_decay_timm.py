"""Factors of ``train.layer_decay`` compared with those of timm's ``param_groups_layer_decay``.

    pip install --no-deps --target DIR timm
    PYTHONPATH=DIR python benchmarks/layer_decay_timm.py

timm's function itself is run on language models that say what their layers are, as timm's own
models do (``group_matcher``): embeddings are the stem, then come the blocks. It does so twice: with
the norm after the last block left to the head's group, as in BEiT, from which timm has the method,
and with the norm in the last block's group, as timm's vision transformers say. timm imports
torchvision for images; where that is absent, names take its place that no language model uses.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
import types
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import print_table, write_result
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from dist_peft.core.config.run import BaseConfig
from dist_peft.model.layer_decay import LayerDecay
from dist_peft.model.skeleton import build_skeleton

_SIZES = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "vocab_size": 50}
CONFIGS: dict[str, tuple[PreTrainedConfig, str, str, str]] = {
    "llama": (
        LlamaConfig(**_SIZES, intermediate_size=24),
        r"^model\.embed_tokens",
        r"^model\.layers\.(\d+)",
        r"^model\.norm",
    ),
    "gpt_neox": (
        GPTNeoXConfig(**_SIZES, intermediate_size=24),
        r"^gpt_neox\.embed_in",
        r"^gpt_neox\.layers\.(\d+)",
        r"^gpt_neox\.final_layer_norm",
    ),
    "opt": (
        OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16, tie_word_embeddings=False),
        r"^model\.decoder\.embed_(?:tokens|positions)",
        r"^model\.decoder\.layers\.(\d+)",
        r"^model\.decoder\.final_layer_norm",
    ),
}
"""Model -> configuration, expressions of the stem, the blocks and the last norm."""


@dataclass(frozen=True)
class Compared:
    """Parameters of one model: how many have timm's factor, and which have not."""

    model: str
    decay: float
    norm_with: str
    parameters: int
    equal: int
    differing: list[str]


class _StandIn(type):
    """A class of which every attribute exists: its name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of torchvision whose every name is an empty class."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def make_class(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _StandIn(name, (nn.Module,), {})

        module.__getattr__ = make_class  # type: ignore[method-assign]


def compute_timm_factors(
    model: nn.Module, stem: str, blocks: str, norm: str | None, decay: float
) -> dict[str, float]:
    from timm.optim import param_groups_layer_decay

    parts: list[Any] = [(blocks, None)]
    if norm is not None:
        parts.append((norm, (99999,)))  # timm's mark for: of the group before
    matcher: Any = lambda coarse=False: {"stem": stem, "blocks": parts}  # noqa: E731
    model.group_matcher = matcher
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def compare(name: str, decay: float, norm_with: str) -> Compared:
    config, stem, blocks, norm = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        skeleton = build_skeleton(BaseConfig(path=directory, quant=None), Path(directory))
    scale = LayerDecay(skeleton.model, skeleton.blocks, decay, lambda parameter: 1.0)
    own_norm = norm if norm_with == "last block" else None
    theirs = compute_timm_factors(model, stem, blocks, own_norm, decay)
    differing = [n for n, factor in theirs.items() if abs(scale(n) - factor) > 1e-12]
    return Compared(
        name, decay, norm_with, len(theirs), len(theirs) - len(differing), sorted(differing)
    )


def main() -> None:
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_StandIns())
    found = [
        compare(name, decay, norm_with)
        for name in CONFIGS
        for norm_with in ("head", "last block")
        for decay in (0.75, 0.385)
    ]
    rows = [
        [c.model, f"{c.decay:g}", c.norm_with, f"{c.equal} of {c.parameters}", *c.differing[:1]]
        for c in found
    ]
    print(f"timm {version('timm')}")
    print_table(["model", "decay", "norm with", "equal", "differing"], [[*r, ""][:5] for r in rows])
    write_result("layer_decay_timm", {"timm": version("timm"), "rows": found})


if __name__ == "__main__":
    main()
