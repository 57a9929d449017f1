"""Pretrain a tiny base model in about a minute on a CPU, without a download.

A Llama of about a million parameters (grouped-query attention, SwiGLU, RMSNorm, rotary positions)
is trained on the sources of Python's standard library, which every installation carries. It
comes as a Hugging Face directory that any tool loads: safetensors, configuration, byte-level BPE
tokenizer with chat template. It generates text that looks like Python and serves to try every
method for larger bases on a laptop's CPU.

The budget is a number of steps: a slow or busy machine takes longer and makes the same base. A base
that is hardly better than guessing among the tokens of the vocabulary is not kept: everything that
is tried on it would look broken.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from dist_peft.core.errors import UserError
from dist_peft.data.chat import make_default_chat_template
from dist_peft.quickstart.corpus import SourceFile, read_stdlib_files
from dist_peft.quickstart.muon import Muon
from dist_peft.store.fileio import translate_write_errors
from dist_peft.store.publish import publish_directory
from dist_peft.store.writer import write_atomically

__all__ = ["PRETRAINING_STEPS", "TinyBaseReport", "pretrain_tiny_base"]

OnStep = Callable[[int, float], None]

CONTEXT = 256
PRETRAINING_STEPS = 300
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_VOCABULARY = 2048
_BATCH = 8
_MUON_LR, _ADAMW_LR, _MIN_LR_RATIO, _WARMUP_STEPS = 0.02, 1e-2, 0.03, 20
_WEIGHT_DECAY, _MAX_GRAD_NORM = 0.1, 1.0
_EVAL_WINDOWS = 32
_MIN_GAIN = 0.5  # nats a token below a uniform distribution over the vocabulary
_AVERAGED_STEPS = 50  # for the reported training loss
_REPORT_FILE = "tiny_base.json"


@dataclass(frozen=True)
class TinyBaseReport:
    """Result of making a tiny base.

    Attributes:
        steps, tokens: optimizer steps, and the target tokens of all steps.
        train_loss, held_out_loss: nats per token: mean over the last steps, and on held-out files.
        seconds: duration of the pretraining, also when the directory is reused.
        parameters: number of weights.
        reused: the directory existed already.
    """

    steps: int
    tokens: int
    train_loss: float
    held_out_loss: float
    seconds: float
    parameters: int
    reused: bool = False

    @property
    def beats_uniform(self) -> bool:
        """Whether the held-out loss is clearly below that of guessing."""
        return self.held_out_loss < math.log(_VOCABULARY) - _MIN_GAIN

    def __str__(self) -> str:
        made = "found, made earlier" if self.reused else "pretrained"
        return (
            f"{made} in {self.seconds:.0f} s: {self.parameters / 1e6:.2f} M parameters, "
            f"{self.steps} steps, {self.tokens:,} tokens, loss {self.train_loss:.3f} in training, "
            f"{self.held_out_loss:.3f} on held-out files (uniform: {math.log(_VOCABULARY):.2f})"
        )


def pretrain_tiny_base(
    out: Path, *, steps: int = PRETRAINING_STEPS, seed: int = 0, on_step: OnStep | None = None
) -> TinyBaseReport:
    """Pretrain the model and save it to ``out``, unless it exists already.

    ``out`` appears under its name only when it is complete. A tiny base in ``out`` that does not
    beat a uniform distribution is replaced.

    Args:
        steps: optimizer steps of 8 sequences of 256 tokens.
        seed: of the weights and the data order.
        on_step: called after each step with its number (from 1) and its loss.

    Raises:
        UserError: ``out`` is not a tiny base, or one made with other arguments; no standard library
            to read; disk full; the new model does not beat a uniform distribution.
    """
    if steps < 1:
        raise UserError(f"a tiny base needs some steps to train, not {steps}")
    request = {"steps": steps, "seed": seed}
    finished = _find_finished(out, request)
    if finished is not None and finished.beats_uniform:
        return finished
    start = time.perf_counter()
    files = read_stdlib_files()
    tokenizer = _train_tokenizer([f.text for f in files if not f.held_out])
    train = _cut_into_sequences(tokenizer, [f for f in files if not f.held_out])
    held_out = _cut_into_sequences(tokenizer, [f for f in files if f.held_out])
    with _fork_random_state(seed), _restore_num_threads():
        model = _build_untrained_model(tokenizer)
        _use_fastest_threads(model, train[: _BATCH // 2])
        losses = _pretrain_model(model, train, steps, on_step)
        held_out_loss = _evaluate_loss(model, held_out)
    recent = losses[-_AVERAGED_STEPS:]
    report = TinyBaseReport(
        steps=len(losses),
        tokens=len(losses) * _BATCH * CONTEXT,
        train_loss=sum(recent) / len(recent),
        held_out_loss=held_out_loss,
        seconds=time.perf_counter() - start,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    if not report.beats_uniform:
        raise UserError(
            f"after {steps} steps the small base is hardly better than guessing (held-out loss "
            f"{held_out_loss:.3f}, uniform {math.log(_VOCABULARY):.2f}) and is not kept; give it "
            f"more steps, {PRETRAINING_STEPS} for example"
        )
    record = {"request": request, "report": asdict(report)}
    _save_model(out, model, tokenizer, record)
    return report


# -- text to sequences ---------------------------------------------------------------------------


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (_BOS, tokenizer.token_to_id(_BOS))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=[bos]
            ),
        ]
    )
    return tokenizer


def _cut_into_sequences(tokenizer: Tokenizer, files: list[SourceFile]) -> Tensor:
    """Concatenate all files as ``<s> text </s>`` and cut them into sequences [n, CONTEXT + 1]."""
    eos = tokenizer.token_to_id(_EOS)
    encoded = tokenizer.encode_batch_fast([f.text for f in files])
    tokens = torch.tensor([token for document in encoded for token in (*document.ids, eos)])
    rows = len(tokens) // (CONTEXT + 1)
    return tokens[: rows * (CONTEXT + 1)].view(rows, CONTEXT + 1)


# -- training ------------------------------------------------------------------------------------


def _build_untrained_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build the model; every in_features is a multiple of 64, the usual quantization group."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 is for widths of a thousand
        bos_token_id=tokenizer.token_to_id(_BOS),
        eos_token_id=tokenizer.token_to_id(_EOS),
        pad_token_id=tokenizer.token_to_id(_PAD),
    )
    return LlamaForCausalLM(config).float()


def _pretrain_model(
    model: nn.Module, rows: Tensor, steps: int, on_step: OnStep | None
) -> list[float]:
    """Train for ``steps`` steps; return the loss of each."""
    optimizers = _build_optimizers(model)
    model.train()
    losses: list[float] = []
    for step, batch in zip(range(steps), _iterate_batches(len(rows)), strict=False):
        scale = _lr_factor(step, steps)
        loss = _next_token_loss(model, rows[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(len(losses), losses[-1])
    return losses


def _build_optimizers(model: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return optimizers with peak learning rates: Muon for the blocks' matrices, AdamW for the
    rest."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if ".layers." in name and p.dim() == 2]
    others = [p for name, p in named if ".layers." not in name or p.dim() != 2]
    return [
        (Muon(inner, lr=_MUON_LR, weight_decay=_WEIGHT_DECAY), _MUON_LR),
        (torch.optim.AdamW(others, lr=_ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0), _ADAMW_LR),
    ]


def _iterate_batches(num_rows: int) -> Iterator[Tensor]:
    """Yield sequence indices [_BATCH] from one random permutation after another, without end."""
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < _BATCH:
            waiting = torch.cat([waiting, torch.randperm(num_rows)])
        yield waiting[:_BATCH]
        waiting = waiting[_BATCH:]


def _lr_factor(step: int, steps: int) -> float:
    """Return the factor of the peak rate at ``step`` (from 0): warm-up, and a cosine over all."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    warmup = min(1.0, (step + 1) / min(_WARMUP_STEPS, steps))
    return warmup * (_MIN_LR_RATIO + (1 - _MIN_LR_RATIO) * cosine)


def _next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of the next tokens of ``rows`` [B, CONTEXT + 1]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def _evaluate_loss(model: nn.Module, rows: Tensor) -> float:
    """Return the mean loss over sequences spread evenly over the held-out files."""
    model.eval()
    chosen = rows[:: max(1, len(rows) // _EVAL_WINDOWS)][:_EVAL_WINDOWS]
    return sum(
        float(_next_token_loss(model, part)) * len(part) for part in chosen.split(_BATCH)
    ) / len(chosen)


@contextmanager
def _fork_random_state(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _restore_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_fastest_threads(model: nn.Module, rows: Tensor) -> None:
    """Set the fastest number of threads as measured; small matrices or busy cores favour few."""
    most = torch.get_num_threads()
    took: dict[int, float] = {}
    for threads in sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)}):
        torch.set_num_threads(threads)
        _next_token_loss(model, rows).backward()
        start = time.perf_counter()
        _next_token_loss(model, rows).backward()
        took[threads] = time.perf_counter() - start
        if took[threads] > 2 * min(took.values()):
            break
    model.zero_grad()
    torch.set_num_threads(min(took, key=took.__getitem__))


# -- the directory -------------------------------------------------------------------------------


def _find_finished(out: Path, request: dict[str, int]) -> TinyBaseReport | None:
    """Return the report of a directory made by the same request; ``None`` if ``out`` is free.

    A request that led to a base no better than guessing does not count.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = out / _REPORT_FILE
    if not report.is_file():
        raise UserError(f"{out} exists and is no tiny base; choose another directory or delete it")
    record = json.loads(report.read_text())
    found = TinyBaseReport(**{**record["report"], "reused": True})
    if found.beats_uniform and record["request"] != request:
        raise UserError(
            f"{out} holds a tiny base made with {record['request']}, not {request}; "
            "choose another directory or delete it"
        )
    return found


def _save_model(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, record: object) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=make_default_chat_template(starts_with_bos=True),
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    disable_progress_bar()  # one file
    with publish_directory(out) as partial, translate_write_errors(out, size):
        model.save_pretrained(partial)
        wrapped.save_pretrained(partial)
        write_atomically(partial / _REPORT_FILE, json.dumps(record, indent=2) + "\n")
