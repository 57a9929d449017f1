"""The configurations that ``methods_table.py`` compares: a line for each method."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = 30

Section = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """Sections of the configuration; ``train`` has keys besides those that all methods share."""

    adapter: Section
    quant: Section | None = None
    train: Section = field(default_factory=dict)


NF4 = {"kind": "nf4"}
INT4 = {"kind": "int", "bits": 4, "group_size": 8}
BUT_DOWN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Linears of stories260K whose inputs (64) groups of 8 divide; ``down_proj`` has 172."""


def lora(r: int, **more: Any) -> dict[str, Any]:
    return {"kind": "lora", "r": r, "alpha": r, **more}


def partial(**parts: Any) -> Method:
    return Method({"kind": "partial", **parts})


FUSED = {"kind": "bottleneck", "reduction_factor": 4}
FUSED_RATE = 1e-2
THIRD = STEPS // 3

METHODS = {
    "rslora r 64": Method(lora(64, use_rslora=True)),
    "lora r 32": Method(lora(32)),
    "full": Method({"kind": "full"}),
    "ptuning, 20": Method({"kind": "ptuning"}),
    "prefix, 20": Method({"kind": "prefix"}),
    "prompt, 20": Method({"kind": "prompt"}),
    "lora r 8": Method(lora(8)),
    "lora r 64": Method(lora(64)),
    "lora r 8, dora": Method(lora(8, use_dora=True)),
    "lora r 8, lora+ (4)": Method(lora(8, lr_ratio=4.0)),
    "lora r 8, pissa": Method(lora(8, init="pissa")),
    "lora r 8, eva": Method(lora(8, init="eva")),
    "lora r 8, lora-ga": Method(lora(8, init="lora_ga")),
    "lora r 8, layer decay 0.8": Method(lora(8), train={"layer_decay": 0.8}),
    "adalora r 12 to 8": Method(
        {"kind": "adalora", "init_r": 12, "target_r": 8, "alpha": 12, "tinit": 5, "tfinal": THIRD}
    ),
    "vera r 256": Method({"kind": "vera"}),
    "loha r 8": Method({"kind": "loha"}),
    "lokr r 8": Method({"kind": "lokr"}),
    "qlora r 8 (nf4)": Method(lora(8), NF4),
    "qlora r 8 (nf4), loftq": Method(lora(8, init="loftq"), NF4),
    "qalora r 8 (int4)": Method(
        {"kind": "qalora", "r": 8, "alpha": 8, "target_modules": BUT_DOWN}, INT4
    ),
    "full, layer decay 0.8": Method({"kind": "full"}, train={"layer_decay": 0.8}),
    "partial, last 2 blocks": partial(last_blocks=2),
    "partial, blocks 0 and 4": partial(blocks=[0, 4]),
    "partial, norms": partial(parts=["norms"]),
    "partial, lisa": partial(parts=["embeddings", "head"], sample_blocks={"count": 2, "every": 5}),
    "partial, from the top": partial(
        parts=["head"],
        unfreeze=[
            *({"step": step, "last_blocks": n} for step, n in ((0, 1), (THIRD, 3))),
            {"step": 2 * THIRD, "parts": ["all"]},
        ],
    ),
    "partial, from the bottom": partial(
        unfreeze=[
            {"step": 0, "until": THIRD, "parts": ["embeddings"], "blocks": [0, 1]},
            {"step": THIRD, "until": 2 * THIRD, "blocks": [2, 3]},
            {"step": 2 * THIRD, "blocks": [4], "parts": ["head"]},
        ]
    ),
    "bottleneck, pfeiffer": Method(FUSED),
    "bottleneck, houlsby": Method({**FUSED, "placement": "houlsby"}),
    "bottleneck, parallel": Method({**FUSED, "placement": "parallel"}),
    "fusion of 2": Method({"kind": "fusion"}),
    "ia3": Method({"kind": "ia3"}),
}
