"""Pretrain a tiny base model in about a minute on a CPU, without a download.

A Llama of about a million parameters (grouped-query attention, SwiGLU, RMSNorm, rotary positions)
is trained on the sources of Python's standard library, which every installation carries. It
comes as a Hugging Face directory that any tool loads: safetensors, configuration, byte-level BPE
tokenizer with chat template. It generates text that looks like Python and serves to try every
method for larger bases on a laptop's CPU.

The budget is time: the learning rate follows a cosine over the *time* allowed, so a slow
machine makes fewer steps but still ends with a small learning rate. Two runs with one seed
therefore see the same sequences in the same order, but not the same number of them.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dist_peft.core.errors import UserError
from dist_peft.data.chat import make_default_chat_template
from dist_peft.quickstart.corpus import SourceFile, read_stdlib_files
from dist_peft.quickstart.muon import Muon
from dist_peft.store.fileio import make_temporary_name, sync_directory, translate_write_errors
from dist_peft.store.writer import write_atomically

__all__ = ["TinyBaseReport", "pretrain_tiny_base"]

OnStep = Callable[[int, float, float], None]

CONTEXT = 256
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_VOCABULARY = 2048
_BATCH = 8
_MUON_LR, _ADAMW_LR, _MIN_LR_RATIO, _WARMUP_STEPS = 0.02, 1e-2, 0.03, 20
_WEIGHT_DECAY, _MAX_GRAD_NORM = 0.1, 1.0
_EVAL_WINDOWS = 32
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

    def __str__(self) -> str:
        made = "found, made earlier" if self.reused else "pretrained"
        return (
            f"{made} in {self.seconds:.0f} s: {self.parameters / 1e6:.2f} M parameters, "
            f"{self.steps} steps, {self.tokens:,} tokens, loss {self.train_loss:.3f} in training, "
            f"{self.held_out_loss:.3f} on held-out files (uniform: {math.log(_VOCABULARY):.2f})"
        )


def pretrain_tiny_base(
    out: Path, *, seconds: float = 75.0, seed: int = 0, on_step: OnStep | None = None
) -> TinyBaseReport:
    """Pretrain the model and save it to ``out``, unless it exists already.

    ``out`` appears under its name only when it is complete.

    Args:
        seconds: time for reading, tokenizer and training together; training gets at least half.
        seed: of the weights and the data order.
        on_step: called after each step with its number (from 1), its loss and the share of the
            time that is gone (0 to 1).

    Raises:
        UserError: ``out`` is not a tiny base, or one made with other arguments; no standard library
            to read; disk full.
    """
    if seconds <= 0:
        raise UserError(f"a tiny base needs some time to train, not {seconds:g} seconds")
    request = {"seconds": seconds, "seed": seed}
    finished = _find_finished(out, request)
    if finished is not None:
        return finished
    start = time.perf_counter()
    files = read_stdlib_files()
    tokenizer = _train_tokenizer([f.text for f in files if not f.held_out])
    train = _cut_into_sequences(tokenizer, [f for f in files if not f.held_out])
    held_out = _cut_into_sequences(tokenizer, [f for f in files if f.held_out])
    with _fork_random_state(seed), _restore_num_threads():
        model = _build_untrained_model(tokenizer)
        _use_fastest_threads(model, train[: _BATCH // 2])
        left = seconds - (time.perf_counter() - start)
        losses = _pretrain_model(model, train, max(left, seconds / 2), on_step)
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
    _save_model(out, model, tokenizer, {"request": request, "report": asdict(report)})
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
    model: nn.Module, rows: Tensor, seconds: float, on_step: OnStep | None
) -> list[float]:
    """Train until the time is over (at least one step); return the loss of each step."""
    optimizers = _build_optimizers(model)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for batch in _iterate_batches(len(rows)):
        share = (time.perf_counter() - start) / seconds
        if losses and share >= 1:
            break
        scale = _lr_factor(len(losses), share)
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
            on_step(len(losses), losses[-1], min(1.0, (time.perf_counter() - start) / seconds))
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


def _lr_factor(step: int, share: float) -> float:
    """Return the factor of the peak rate: warm-up over steps, cosine over the elapsed ``share``."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
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


def _find_finished(out: Path, request: dict[str, float]) -> TinyBaseReport | None:
    """Return the report of a directory made by the same request; ``None`` if ``out`` is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    report = out / _REPORT_FILE
    if not report.is_file():
        raise UserError(f"{out} exists and is no tiny base; choose another directory or delete it")
    record = json.loads(report.read_text())
    if record["request"] != request:
        raise UserError(
            f"{out} holds a tiny base made with {record['request']}, not {request}; "
            "choose another directory or delete it"
        )
    return TinyBaseReport(**{**record["report"], "reused": True})


def _save_model(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, record: object) -> None:
    """Write everything to a temporary directory, then rename it to ``out``."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=make_default_chat_template(starts_with_bos=True),
    )
    temporary = make_temporary_name(out)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with translate_write_errors(out, size):
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            wrapped.save_pretrained(temporary)
            write_atomically(temporary / _REPORT_FILE, json.dumps(record, indent=2) + "\n")
            os.replace(temporary, out)
            sync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
