"""Verify an export with its real consumer: reload it and compare with the trained model.

A run saves a *probe*: a few held-out tokens with the logits of the trained model and of the same
base before training. The export is loaded by plain ``transformers`` and must return the trained
logits; its error is relative to the change by training, since an export that lost the adapter can
have a small absolute error too.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.model.hub import read_json_object
from dist_peft.model.model_class import choose_auto_class
from dist_peft.store.writer import write_atomically

__all__ = [
    "COMPARED_ELEMENTS",
    "EXACT_BOUND",
    "Comparison",
    "Probe",
    "check_generation",
    "choose_model_class",
    "compare_logits",
    "compute_directory_logits",
    "generate_greedy",
    "verify_directory",
]

log = logging.getLogger("dist_peft")


@dataclass
class Probe:
    """Tokens with logits of the trained model and of the base before training.

    Attributes:
        input_ids: token ids [B, S].
        trained: logits of the trained model [B, S, V]; of a classifier [B, classes].
        before: logits of the base before training, in the same shape.
    """

    input_ids: Tensor
    trained: Tensor
    before: Tensor

    def swap_models(self) -> "Probe":
        """Return the probe whose goal is the base: ``trained`` and ``before`` change places."""
        return Probe(self.input_ids, self.before, self.trained)

    def save_probe(self, path: Path) -> None:
        """Write the probe as a safetensors file, atomically."""
        tensors = {k: v.contiguous().clone() for k, v in vars(self).items()}
        write_atomically(path, save(tensors, metadata={"format": "pt"}))

    @classmethod
    def load_probe(cls, path: Path) -> "Probe":
        """Read a probe from a safetensors file.

        Raises:
            UserError: the file is missing or damaged.
        """
        if not path.is_file():
            raise UserError(
                f"{path} is missing, so the result cannot be compared with the trained model; "
                "resume the run if it did not finish, or pass --no-verify"
            )
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(
                f"{path} is damaged: {error}; remove it (exports can then no longer be verified)"
            ) from None


@dataclass(frozen=True)
class Comparison:
    """Distance between an export's logits and the trained model's on the probe.

    ``relative`` is the root mean square error over the root mean square change that training made:
    0 is exact, 1 means that the adapter is lost. Where training changed nothing (``changed`` is
    false) it is the error over the standard deviation of the trained logits. ``kl`` is the mean
    Kullback-Leibler divergence in nats, ``kl_before`` that of the base before training, ``top1``
    the share of positions with the same most likely token.
    """

    max_error: float
    mean_error: float
    relative: float
    kl: float
    top1: float
    kl_before: float
    changed: bool

    def format_rows(self) -> list[tuple[str, str]]:
        """Return the rows of a table: (quantity, value)."""
        return [
            ("Largest error of a logit", f"{self.max_error:.2e}"),
            ("Mean error of a logit", f"{self.mean_error:.2e}"),
            ("Error over the change by training", f"{self.relative:.2%}"),
            ("KL divergence", f"{self.kl:.2e} nats"),
            ("Same top token", f"{self.top1:.1%}"),
        ]

    def __str__(self) -> str:
        return self.describe_distance("the trained model", "untrained base")

    def describe_distance(self, goal: str, origin: str) -> str:
        """Return the figures in one line.

        Args:
            goal, origin: names of the models whose logits the probe has as ``trained``, ``before``.
        """
        return (
            f"logits against {goal}: max error {self.max_error:.2e}, "
            f"mean {self.mean_error:.2e}, {self.relative:.2%} of the change by training; "
            f"KL {self.kl:.2e} nats ({origin} {self.kl_before:.2e}); "
            f"same top token {self.top1:.1%}"
        )


EXACT_BOUND = 0.05
"""Maximum error of a form that keeps the trained function, relative to the change by training."""

COMPARED_ELEMENTS = 2**18
"""Logits compared at a time, or those of one position: 2 MiB in float64, about eight tensors of
which are alive."""

_LOWEST = torch.finfo(torch.float16).min
"""Logits from here down are of masked tokens: the lowest numbers of other types are lower still."""

_UNCHANGED = 1e-6
"""A change below this share of the logits' standard deviation counts as none."""


def compare_logits(logits: Tensor, probe: Probe) -> Comparison:
    """Compare ``logits`` [B, S, V] with the probe's, in float64, a few positions at a time.

    Raises:
        UserError: the shapes differ.
    """
    if logits.shape != probe.trained.shape:
        raise UserError(
            f"the export returns logits of shape {list(logits.shape)}, "
            f"the trained model returned {list(probe.trained.shape)}"
        )
    got, want, before = (
        each.reshape(-1, each.shape[-1]) for each in (logits, probe.trained, probe.before)
    )
    chunks = list(Span(0, len(want)).split_into_chunks(_count_chunk_positions(want)))
    parts = [_compare_positions(got[c.slice], want[c.slice], before[c.slice]) for c in chunks]
    largest = torch.stack([part[0] for part in parts]).max()
    sums = torch.stack([part[1] for part in parts]).sum(0)
    absolute, squared, change, kl, kl_before, same = (sums / len(want)).unbind()
    size, spread = change / want.shape[1], _compute_finite_variance(want, chunks)
    changed = bool(size > _UNCHANGED**2 * spread) or not bool(size.isfinite())
    reference = size if changed else spread
    return Comparison(
        max_error=largest.item(),
        mean_error=absolute.item() / want.shape[1],
        relative=(squared / want.shape[1] / reference.clamp_min(1e-30)).sqrt().item(),
        kl=kl.item(),
        top1=same.item(),
        kl_before=kl_before.item(),
        changed=changed,
    )


def _count_chunk_positions(logits: Tensor) -> int:
    return max(1, COMPARED_ELEMENTS // max(1, logits.shape[-1]))


def _compare_positions(got: Tensor, want: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return, of some positions ``[n, V]`` in float64, the largest error and six sums: over all
    logits of the error, of its square and of that of the change; over the positions of both
    divergences and of equal top tokens."""
    got, want, before = (_mask_lowest(each.double()) for each in (got, want, before))
    error, change = _compute_difference(got, want), _compute_difference(want, before)
    absolute = error.abs()
    sums = (
        absolute.sum(),
        error.square().sum(),
        change.square().sum(),
        _sum_kl_divergences(want, got),
        _sum_kl_divergences(want, before),
        (got.argmax(-1) == want.argmax(-1)).double().sum(),
    )
    return absolute.max(), torch.stack(sums)


def _compute_finite_variance(logits: Tensor, chunks: Sequence[Span]) -> Tensor:
    """Return the variance of the finite values of ``[n, V]``, float64."""
    total = count = torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        values = _mask_lowest(logits[chunk.slice].double())
        finite = values.isfinite()
        total = total + torch.where(finite, values, 0.0).sum()
        count = count + finite.sum()
    squares = torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        centred = _mask_lowest(logits[chunk.slice].double()) - total / count
        squares += torch.where(centred.isfinite(), centred, 0.0).square().sum()
    return squares / count


def _mask_lowest(logits: Tensor) -> Tensor:
    """Return ``logits`` with minus infinity for the lowest number of a type, which some models
    give masked tokens (Chameleon): the figures would be of these alone."""
    return torch.where(logits <= _LOWEST, -math.inf, logits)


def _compute_difference(got: Tensor, want: Tensor) -> Tensor:
    """Return ``got - want``, with 0 where both are the same infinity (masked tokens)."""
    return torch.where(got == want, 0.0, got - want)


def _sum_kl_divergences(want: Tensor, got: Tensor) -> Tensor:
    """Return the sum of the Kullback-Leibler divergences of the positions, in nats."""
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    return (log_want.exp() * _compute_difference(log_want, log_got)).sum()


@torch.no_grad()
def verify_directory(
    directory: Path, probe: Probe, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Comparison:
    """Load ``directory`` with plain ``transformers`` and compare it with the probe.

    A language model must also generate; a failure of ``generate`` is logged as a warning.
    """
    model, classifies = _load_directory(directory, dtype, trust_remote_code)
    found = compare_logits(model(input_ids=probe.input_ids, use_cache=False).logits.float(), probe)
    if not classifies:
        try:
            check_generation(model, probe.input_ids)
        except VerificationSkipped as error:
            log.warning("NOT VERIFIED: %s", error)
    return found


@torch.no_grad()
def compute_directory_logits(
    directory: Path, ids: Tensor, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Tensor:
    """Return the logits of tokens ``ids`` [B, S] by plain ``transformers``, as float32."""
    model, _ = _load_directory(directory, dtype, trust_remote_code)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _load_directory(
    directory: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, bool]:
    """Return the model, and whether it is a classifier."""
    disable_progress_bar()  # one bar per file would hide the result
    auto = choose_model_class(directory)
    model = auto.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval(), auto is AutoModelForSequenceClassification


def choose_model_class(directory: Path) -> Any:
    """Return the class of ``transformers`` that loads ``directory``, by its ``config.json``."""
    file = directory / "config.json"
    return choose_auto_class(read_json_object(file) if file.is_file() else {})


def check_generation(model: Any, ids: Tensor) -> None:
    """Generate two tokens with a loaded model, as its users will.

    Raises:
        NotVerified: ``generate`` fails.
    """
    if not model.can_generate():
        return
    try:
        mask = torch.ones_like(ids[:1])
        pad = model.config.get_text_config().pad_token_id or 0
        model.generate(
            input_ids=ids[:1],
            attention_mask=mask,
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=pad,
        )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise VerificationSkipped(
            f"plain generate of transformers fails here: {type(error).__name__}: {reason}"
        ) from None


@torch.no_grad()
def generate_greedy(directory: Path, prompts: list[str], max_new_tokens: int = 60) -> list[str]:
    """Return greedy continuations of ``prompts`` by plain ``transformers``."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = choose_model_class(directory).from_pretrained(directory, dtype=torch.float32).eval()
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
