"""Scheduled sampling: schedules, what is replaced and by what, in whatever batch it stands."""

import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig, ScheduledSamplingConfig
from dist_peft.data.loader import Batch
from dist_peft.engine.single import SingleEngine
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader
from dist_peft.train import head_loss, predicted_inputs
from dist_peft.train.loss import IGNORE
from dist_peft.train.objective import TokenObjective
from dist_peft.train.predicted_inputs import (
    ScheduledSampling,
    choose_tokens,
    compute_gold_probability,
    draw_document_uniforms,
    find_replaceable_inputs,
)
from tests.support.tiny_models import CONFIGS, save_model

CPU = torch.device("cpu")
LINEAR = {"schedule": "linear", "k": 0.9, "c": 0.01, "eps_min": 0.2}
ALWAYS, NEVER = ScheduledSamplingConfig(c=0, k=0), ScheduledSamplingConfig(c=0)
DOCUMENTS = [(5, 2), (1, 0), (9, 4), (7, 1), (2, 1)]
"""Lengths of documents, and of their prompts."""


@pytest.mark.parametrize(
    ("section", "formula"),
    [
        (LINEAR, lambda i: max(0.2, 0.9 - 0.01 * i)),
        ({"schedule": "exponential", "k": 0.97}, lambda i: 0.97**i),
        ({"schedule": "inverse_sigmoid", "k": 12.0}, lambda i: 12 / (12 + math.exp(i / 12))),
    ],
)
def test_schedules_are_the_paper_s(section: dict, formula: object) -> None:
    config = ScheduledSamplingConfig(**section)
    found = [compute_gold_probability(config, i) for i in range(300)]
    assert found == pytest.approx([formula(i) for i in range(300)], rel=1e-12)  # type: ignore[operator]
    assert sorted(found, reverse=True) == found and 0 < found[-1] < found[0] <= 1
    assert compute_gold_probability(config, 10**9) == config.eps_min


def make_documents() -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each of ``DOCUMENTS``."""
    made = []
    for seed, (length, prompt) in enumerate(DOCUMENTS):
        tokens = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))
        labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
        labels[: max(0, prompt - 1)] = IGNORE
        made.append((tokens, labels))
    return made


def pack(rows: list[list[int]], width: int) -> Batch:
    """A batch whose rows hold these documents."""
    ids, labels = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), IGNORE)
    positions = torch.zeros_like(ids)
    for b, numbers in enumerate(rows):
        start, documents = 0, make_documents()
        for number in numbers:
            stop = start + DOCUMENTS[number][0]
            ids[b, start:stop], labels[b, start:stop] = documents[number]
            positions[b, start:stop] = torch.arange(stop - start)
            start = stop
        positions[b, start:] = torch.arange(width - start)
    return Batch(ids, labels, positions, torch.arange(len(rows)))


def cut(values: Tensor, rows: list[list[int]]) -> dict[int, Tensor]:
    """Values of a batch of ``pack``, by document."""
    found = {}
    for b, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            found[number] = values[b, start : start + DOCUMENTS[number][0]]
            start += DOCUMENTS[number][0]
    return found


PACKED, APART = [[3, 1, 0], [4, 2]], [[i] for i in range(len(DOCUMENTS))]


def test_completion_inputs_alone_are_replaceable() -> None:
    batch = pack(PACKED, 14)
    # two of one turn, a gap (another user turn), and a second turn
    turns = torch.tensor([[IGNORE, 5, 6, IGNORE, IGNORE, 7, 8, IGNORE]])
    chat = Batch(torch.arange(8)[None], turns, torch.arange(8)[None], torch.zeros(1).long())
    assert find_replaceable_inputs(chat).tolist() == [
        [False, False, True, True, *[False] * 2, True, False]
    ]
    found = cut(find_replaceable_inputs(batch), PACKED)
    for number, (length, prompt) in enumerate(DOCUMENTS):
        want = [max(1, prompt) <= place < length - 1 for place in range(length)]
        assert found[number].tolist() == want, number
    assert find_replaceable_inputs(batch).sum() == sum(
        n.sum() for n in found.values()
    )  # no padding


def test_draws_belong_to_documents() -> None:
    """Not to rows, neighbours or padding; other steps and seeds have others."""
    one, other = pack(PACKED, 14), pack(APART[::-1], 24)
    draws = [
        cut(draw_document_uniforms(3, 7, batch, find_replaceable_inputs(batch)), rows)
        for batch, rows in ((one, PACKED), (other, APART[::-1]))
    ]
    for number in range(len(DOCUMENTS)):
        assert torch.equal(draws[0][number], draws[1][number])
    assert draws[0][2].ne(0).all() and not draws[0][1].any()  # one token: nothing to draw
    for seed, step in ((4, 7), (3, 8)):
        changed = draw_document_uniforms(seed, step, one, find_replaceable_inputs(one))
        assert cut(changed, PACKED)[2].ne(draws[0][2]).all()


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9), st.floats(0, 1, exclude_max=True))
def test_a_token_is_drawn_from_its_share_of_the_probability(logits: list[float], u: float) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    token = int(choose_tokens(row, torch.tensor([u], dtype=torch.float64), 2.0))
    sums = torch.softmax(row[0] / 2, 0).cumsum(0)
    assert (sums[token - 1] if token else 0) <= u + 1e-9 and u <= sums[token] + 1e-9
    assert int(choose_tokens(row, torch.zeros(1), 0.0)) == int(row.argmax())


def test_no_logits_and_broken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted_inputs, "_DRAWN_ELEMENTS", 11)  # two rows at a time
    broken = torch.full((5, 5), math.nan)
    assert choose_tokens(broken, torch.rand(5).double(), 1.0).max() < 5
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert choose_tokens(impossible, torch.zeros(1).double(), 1.0).tolist() == [1]
    for temperature in (0.0, 1.0):
        assert len(choose_tokens(broken[:0], torch.zeros(0).double(), temperature)) == 0


def load(directory: Path, dtype: str) -> nn.Module:
    base = BaseConfig(path=str(directory), quant=None, compute_dtype=dtype)  # type: ignore[arg-type]
    skeleton, engine = build_skeleton(base, directory), SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton.model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model(CONFIGS["llama"], directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_head", [True, False])
def test_packed_documents_get_the_predictions_of_transformers(
    llama: Path, dtype: str, at_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document alone; chunk by chunk in the head, and from whole logits."""
    model = load(llama, dtype)
    monkeypatch.setattr(model, "head_output_is_logits", at_head)
    monkeypatch.setitem(head_loss._CHUNK_ELEMENTS, "cpu", 97 * 3)
    reference = tf.AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    mixed, sampling = [], ScheduledSampling(ALWAYS, seed=0)
    for rows, width in ((PACKED, 14), (APART, 10)):
        batch, gold = pack(rows, width), pack(rows, width)
        sampling.begin_step(0)
        found = sampling.mix_inputs(model, TokenObjective(), batch, CPU)
        assert torch.equal(batch.input_ids, gold.input_ids) and found.labels is batch.labels
        assert (
            sampling.counts[0]
            == sampling.counts[1]
            == sum(max(0, length - 1 - max(1, prompt)) for length, prompt in DOCUMENTS)
        )
        mixed.append(cut(found.input_ids, rows))
    for number, ((tokens, _), (length, prompt)) in enumerate(
        zip(make_documents(), DOCUMENTS, strict=True)
    ):
        with torch.no_grad():
            predicted = reference(input_ids=tokens[None]).logits[0].argmax(1)
        want, first = tokens.clone(), max(1, prompt)
        want[first : length - 1] = predicted[first - 1 : length - 2]
        for found in mixed if dtype == "float32" else mixed[1:]:
            assert found[number].tolist() == want.tolist(), number
    assert any(found.ne(make_documents()[n][0]).any() for n, found in mixed[0].items())


def test_gold_inputs_need_no_pass(llama: Path) -> None:
    """And a rank without any sequence still runs one where there is one."""
    model, calls = load(llama, "float32"), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch, sampling = pack(PACKED, 14), ScheduledSampling(NEVER, seed=0)
    sampling.begin_step(10**6)
    assert sampling.mix_inputs(model, TokenObjective(), batch, CPU) is batch
    assert calls == [] and sampling.counts == [0, 0]
    filler = Batch(
        *(t[:1] for t in (batch.input_ids, batch.labels, batch.position_ids)),
        -batch.sample_ids[:1] - 1,
    )
    filler.labels.fill_(IGNORE)
    sampling = ScheduledSampling(ALWAYS, seed=0)
    sampling.begin_step(0)
    model.train()
    found = sampling.mix_inputs(model, TokenObjective(), filler, CPU)
    assert torch.equal(found.input_ids, filler.input_ids) and calls == [False]
    assert sampling.counts == [0, 0] and model.training


def test_shares_are_those_of_the_schedule_and_the_softmax() -> None:
    """Over many steps, and many tokens of one place."""
    batch = pack(PACKED, 14)
    inputs = find_replaceable_inputs(batch)
    kept = [
        draw_document_uniforms(1, step, batch, inputs)[inputs][:, 0] < 0.7 for step in range(99)
    ]
    count = 99 * int(inputs.sum())
    assert abs(int(torch.cat(kept).sum()) - 0.7 * count) < 4 * (0.7 * 0.3 * count) ** 0.5
    logits = torch.tensor([[0.0, 3.0, 1.0, -1.0]]).expand(5000, -1)
    uniforms = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose_tokens(logits, uniforms, 2.0).bincount() / 5000
    torch.testing.assert_close(drawn, torch.softmax(logits[0] / 2, 0), rtol=0, atol=0.03)
