"""A run's steps with scheduled sampling are those of a loop over transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn import functional

from dist_peft.core.world import World
from dist_peft.train.step_metrics import read_metrics
from tests.support.story_runs import train
from tests.support.tiny_runs import tiny_tree


def test_predicted_inputs_equal_a_loop_over_transformers(tmp_path: Path) -> None:
    """Three steps of two rows, as the command computes them, stopped and resumed."""
    tree = tiny_tree(
        tmp_path,
        adapter={"kind": "partial", "parts": ["norms"]},
        train__scheduled_sampling={"c": 0, "k": 0},
        train__max_grad_norm=0,
        train__shuffle=False,
        train__warmup=0,
        train__schedule="constant",
        data__eval=[],
    )
    assert [train(World(), tree, 1), train(World(), tree)] == [75, 0]
    tokenizer = tf.AutoTokenizer.from_pretrained(tree["base"]["path"])
    model = tf.AutoModelForCausalLM.from_pretrained(tree["base"]["path"], dtype=torch.float32)
    model.requires_grad_(False)
    norms = [p.requires_grad_() for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(norms, lr=tree["train"]["lr"], weight_decay=0)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    expected, changed = [], 0
    for step in range(3):
        losses = []
        for record in records[2 * step : 2 * step + 2]:
            prompt = tokenizer(record["prompt"]).input_ids
            target = [*tokenizer(record["completion"]).input_ids, tokenizer.eos_token_id]
            gold = torch.tensor([prompt + target])
            with torch.no_grad():
                predicted = model(gold).logits.argmax(2)
            inputs, first = gold.clone(), len(prompt)
            inputs[:, first:-1] = predicted[:, first - 1 : -2]
            changed += int((inputs != gold).sum())
            logits = model(inputs).logits[0, first - 1 : -1]
            losses.append(functional.cross_entropy(logits, gold[0, first:], reduction="none"))
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r.loss for r in found] == pytest.approx(expected, rel=1e-5)
    assert changed > 10 and {(r.sampling_eps, r.sampling_replaced) for r in found} == {(0.0, 1.0)}
    assert "100.0% on average" in (tmp_path / "run" / "report.html").read_text()
