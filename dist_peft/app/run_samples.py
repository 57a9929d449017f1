"""Samples of a run: the model's text for a few held-out prompts, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import RunConfig
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.world import World
from dist_peft.train.evaluate import inference_mode
from dist_peft.train.samples import (
    MAX_PROMPT_TOKENS,
    SamplePrompt,
    continue_greedily,
    select_sample_prompts,
)
from dist_peft.train.step_metrics import StepMetrics

__all__ = ["SAMPLE_TOKENS", "RunSamples"]

Texts = list[dict[str, str]]

SAMPLE_TOKENS = 16
"""Generated for each prompt: as many forward passes before training, and after it."""

_SHOWN_CHARACTERS = 2000


@dataclass
class RunSamples:
    """``train.samples`` prompts of ``data.eval``, or of ``data.train`` where there is none.

    Attributes:
        before: texts of the model before training; None until they are generated.
    """

    config: RunConfig
    loaders: DataLoaders
    built: LoadedModel
    world: World
    before: Texts | None = None

    @cached_property
    def prompts(self) -> list[SamplePrompt]:
        """The prompts; none of a classifier."""
        data, train = self.config.data, self.config.train
        room = data.seq_len - SAMPLE_TOKENS
        if not train.samples or data.is_classification or room < 1:
            return []
        rows: Any = (self.loaders.eval or self.loaders.train).rows
        return select_sample_prompts(rows, train.samples, min(MAX_PROMPT_TOKENS, room))

    def generate_before(self, first_step: int) -> None:
        """Generate the texts before training, in a run that begins at step 0. Collective."""
        self.before = self.generate_texts() if first_step == 0 else None

    def add_before(self, record: StepMetrics) -> StepMetrics:
        """Return the record of the first step with the texts of before it."""
        return replace(record, sample_texts_before=self.before)

    def add_after(self, record: StepMetrics, is_end: bool) -> StepMetrics:
        """Return the record of a step; of the last one with the texts after it. Collective."""
        return replace(record, sample_texts=self.generate_texts()) if is_end else record

    def generate_texts(self) -> Texts | None:
        """Return prompt, generated text and expected text of each; None without any. Collective."""
        if not self.prompts:
            return None
        train, tokenizer = self.config.train, self.built.setup.tokenizer
        stops = {cast(int, tokenizer.eos_token_id), *self._list_turn_ends()}
        widest = max(len(prompt.tokens) for prompt in self.prompts) + SAMPLE_TOKENS
        # no more tokens in a forward than in training
        rows = max(1, train.micro_batch * self.config.data.seq_len // widest)
        made: list[list[int]] = []
        with (
            inference_mode(self.built.model),
            enter_phase("generate samples", SETUP_PATIENCE),
        ):
            for first in range(0, len(self.prompts), rows):
                made += continue_greedily(
                    self.built.model,
                    self.prompts[first : first + rows],
                    max_new_tokens=SAMPLE_TOKENS,
                    stop_ids=sorted(stops),
                    pad_id=0,
                    device=self.built.engine.device,
                    share=lambda tokens: self.world.broadcast_tensor(tokens, 0),
                )
        return [
            {
                "prompt": self._decode(prompt.tokens, special=True),
                "text": self._decode(tokens),
                "expected": self._decode(prompt.expected[:SAMPLE_TOKENS]),
            }
            for prompt, tokens in zip(self.prompts, made, strict=True)
        ]

    def _list_turn_ends(self) -> list[int]:
        """Return the end tokens of the expected texts: a template may have its own."""
        special = set(self.built.setup.tokenizer.all_special_ids)
        special |= set(self.built.setup.tokenizer.added_tokens_decoder)
        return [p.expected[-1] for p in self.prompts if p.expected and p.expected[-1] in special]

    def _decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        text = self.built.setup.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return str(text)[-_SHOWN_CHARACTERS:]
