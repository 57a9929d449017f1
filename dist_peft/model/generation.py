"""Generate text from one prompt, token by token, with ``generate`` of ``transformers``.

``transformers`` runs the loop, keeps the family's own kind of key-value cache and stops at the end
tokens. One thing is added, as a logits processor: how the next token ``t`` is chosen from the
logits ``z`` of the last position::

    temperature 0     t = argmax z                                        greedy
    temperature T     p = softmax(z / T); the smallest set of most likely tokens whose
                      probabilities sum to top_p or more; t is drawn from p within the set
                      (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration")

It is computed in float32 on the CPU and drawn with a generator of its own, so that a seed gives the
same draws on every device. On several ranks that hold a sharded model together all compute the same
logits; the first rank's choice is sent to the others, since a rank that chose another token, for
the last bit of a logit, would wait in another collective than its peers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, TextStreamer
from transformers.utils.logging import disable_progress_bar

from dist_peft.core.errors import UserError
from dist_peft.core.progress_beat import mark_progress
from dist_peft.model.hub import (
    REFUSALS,
    Tokenizer,
    format_library_error,
    read_json_object,
    refuse_hub_kernels,
)
from dist_peft.model.model_class import choose_auto_class, is_classifier

__all__ = [
    "Sampling",
    "TokenChooser",
    "count_free_positions",
    "encode_plain_prompt",
    "generate_tokens",
    "load_plain_model",
    "select_token",
]

ShareToken = Callable[[Tensor], None]
"""Replaces the ids of a tensor, int64 ``[1]`` on the CPU, by those of the first rank, in place."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: 0: the most likely token.
        top_p: share of the probability that tokens are drawn from, above 0 and at most 1.
        seed: of the draws.
        use_cache: keep keys and values of earlier tokens.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    use_cache: bool = True


def select_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token.

    Args:
        logits: ``[V]``.
        generator: of the CPU; not used with temperature 0.
    """
    scores = logits.detach().float().cpu()
    if sampling.temperature == 0:
        return int(scores.argmax())
    shares, tokens = (scores / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    # a token is in the set while those before it have less than top_p
    shares[shares.cumsum(-1) - shares >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])


class TokenChooser(LogitsProcessor):
    """Leave ``generate`` one possible token: that of ``select_token`` on the first rank."""

    def __init__(self, sampling: Sampling, share: ShareToken) -> None:
        self._sampling = sampling
        self._share = share
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.tensor([select_token(scores[0], self._sampling, self._generator)])
        self._share(chosen)
        mark_progress()
        only = torch.full_like(scores, -torch.inf)
        only[:, int(chosen)] = 0
        return only


class _CallbackStreamer(TextStreamer):
    """Pass on whole words as they are complete."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    device: torch.device,
    share: ShareToken = lambda token: None,
    show: Callable[[str], None] | None = None,
) -> list[int]:
    """Return the tokens after ``prompt``, the one that ends the text included.

    On several ranks a collective: all call it with the same arguments.

    Args:
        model: of ``transformers``, in evaluation mode.
        prompt: at least one token.
        stop_ids: tokens that end the text; none: those of the model's configuration.
        share: see ``ShareToken``.
        show: called with pieces of the text as they are complete.

    Raises:
        UserError: the prompt leaves no position for an answer.
    """
    free = count_free_positions(model, len(prompt))
    ids = torch.tensor([list(prompt)], device=device)
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, free),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=sampling.use_cache,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=list(stop_ids) or None,
    )
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=[TokenChooser(sampling, share)],
        streamer=None if show is None else _CallbackStreamer(tokenizer, show),
        synced_gpus=False,  # all ranks have the same tokens, and stop together
    )
    return [int(token) for token in found[0, len(prompt) :]]


def count_free_positions(model: Any, used: int) -> int:
    """Return how many tokens may follow ``used`` ones; a large number where the model has no limit.

    Raises:
        UserError: none.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    free = (known or 2**31) - used
    if free < 1:
        raise UserError(
            f"the conversation has {used} tokens, and the model takes {known} "
            "(max_position_embeddings); begin a new one with a shorter prompt"
        )
    return free


def encode_plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of ``text`` as in training: the tokenizer's bos first, no eos at its end.

    Raises:
        UserError: there is none.
    """
    plain = [int(t) for t in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if not plain:
        raise UserError(
            "the prompt is empty: the tokenizer makes no token of it; write at least one word"
        )
    whole = [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]
    for place in range(1, len(whole) - len(plain) + 1):
        front = whole[:place]
        if whole[place : place + len(plain)] == plain and plain[:place] != front:
            return front + plain
    return plain


def load_plain_model(path: Path, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """Load a merged or exported model as its users do: with ``transformers`` alone.

    Args:
        path: a directory, whose ``adapter/`` is applied with PEFT if there is one, or a GGUF file.

    Raises:
        UserError: ``transformers`` cannot load it.
    """
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    directory, auto = path, choose_auto_class({})
    if path.suffix == ".gguf":
        options["gguf_file"], directory = path.name, path.parent
    else:
        options["use_safetensors"] = True  # nothing is unpickled
        file = path / "config.json"
        described = read_json_object(file)
        if not trust_remote_code:
            refuse_hub_kernels(described, file)
        auto = choose_auto_class(described)
        if is_classifier(described):
            raise UserError(f"{path} is a classifier, which generates no text")
    disable_progress_bar()  # the answer follows
    try:
        model: Any = auto.from_pretrained(directory, **options)
        if (path / "adapter").is_dir():
            model.load_adapter(str(path / "adapter"))
    except (*REFUSALS, RuntimeError) as error:
        raise UserError(f"transformers cannot load {path}: {format_library_error(error)}") from None
    return model.to(device).eval()
