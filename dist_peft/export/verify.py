"""Proving an export with its real consumer: reload it and compare with the trained model.

A run leaves a *probe*: a few held-out tokens with the logits of the trained model and those of the
same base before training. The export is loaded by plain ``transformers`` and must give the trained
logits; its error is put in relation to what the adapter changed at all, since an export that lost
the adapter has a small absolute error too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from dist_peft.core.errors import UserError
from dist_peft.store.writer import atomic_write

__all__ = ["Comparison", "Probe", "compare", "generate", "verify_directory"]


@dataclass
class Probe:
    """Tokens [B, S] with the trained model's logits and the base's before training [B, S, V]; a
    classifier's are [B, classes]."""

    input_ids: Tensor
    trained: Tensor
    before: Tensor

    def save(self, path: Path) -> None:
        tensors = {k: v.contiguous().clone() for k, v in vars(self).items()}
        atomic_write(path, save(tensors, metadata={"format": "pt"}))

    @classmethod
    def load(cls, path: Path) -> "Probe":
        if not path.is_file():
            raise UserError(
                f"{path} is missing, so the result cannot be compared with the trained model; "
                "resume the run if it did not finish, or give --no-verify"
            )
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(
                f"{path} is damaged: {error}; remove it (exports can then not be verified)"
            ) from None


@dataclass(frozen=True)
class Comparison:
    """Distance between an export's logits and the trained model's on the probe.

    ``relative`` is the root mean square error over the root mean square change that training made:
    0 is exact, 1 means that the adapter is lost. ``kl`` is the mean Kullback-Leibler divergence in
    nats, ``top1`` the share of positions with the same most likely token.
    """

    max_error: float
    mean_error: float
    relative: float
    kl: float
    top1: float

    def rows(self) -> list[tuple[str, str]]:
        """For a table: (what, value)."""
        return [
            ("Largest error of a logit", f"{self.max_error:.2e}"),
            ("Mean error of a logit", f"{self.mean_error:.2e}"),
            ("Error over the change by training", f"{self.relative:.2%}"),
            ("KL divergence", f"{self.kl:.2e} nats"),
            ("Same top token", f"{self.top1:.1%}"),
        ]

    def __str__(self) -> str:
        return (
            f"logits against the trained model: max error {self.max_error:.2e}, "
            f"mean {self.mean_error:.2e}, {self.relative:.2%} of what training changed; "
            f"KL {self.kl:.2e} nats; same top token {self.top1:.1%}"
        )


def compare(logits: Tensor, probe: Probe) -> Comparison:
    """Compare ``logits`` [B, S, V] with the probe's."""
    if logits.shape != probe.trained.shape:
        raise UserError(
            f"the export gives logits of shape {list(logits.shape)}, "
            f"the trained model gave {list(probe.trained.shape)}"
        )
    got, want = logits.double(), probe.trained.double()
    error, change = got - want, want - probe.before.double()
    log_got, log_want = got.log_softmax(-1), want.log_softmax(-1)
    return Comparison(
        max_error=error.abs().max().item(),
        mean_error=error.abs().mean().item(),
        relative=(error.square().mean() / change.square().mean().clamp_min(1e-30)).sqrt().item(),
        kl=(log_want.exp() * (log_want - log_got)).sum(-1).mean().item(),
        top1=(got.argmax(-1) == want.argmax(-1)).double().mean().item(),
    )


@torch.no_grad()
def verify_directory(directory: Path, probe: Probe, dtype: torch.dtype) -> Comparison:
    """Load ``directory`` with plain ``transformers`` and compare."""
    disable_progress_bar()  # a bar for each file would hide the one line that matters
    architectures = AutoConfig.from_pretrained(directory).architectures or [""]
    classifies = architectures[0].endswith("ForSequenceClassification")
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=dtype).eval()
    return compare(model(input_ids=probe.input_ids, use_cache=False).logits.float(), probe)


@torch.no_grad()
def generate(directory: Path, prompts: list[str], max_new_tokens: int = 60) -> list[str]:
    """Greedy continuations of ``prompts`` by plain ``transformers``."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        text = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        texts.append(text.strip())
    return texts
