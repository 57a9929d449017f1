"""Domain-adversarial training: against a plain loop, on every engine, through a stop."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from yaml import safe_load

from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator
from dist_peft.app import cli
from dist_peft.app.data_setup import make_data_loaders
from dist_peft.app.model_setup import build_model, load_weights
from dist_peft.app.resolved_config import ResolvedConfig
from dist_peft.app.step_setup import make_training_step
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import DomainAdversarialConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.train.domain_objective import DomainObjective, compute_reversal_strength
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.step_metrics import read_metrics
from tests.support.classification_runs import (
    LABELS,
    classifying_tree,
    domain_tree,
    save_classifier_base,
)
from tests.support.dist import run_ranks
from tests.support.story_runs import train
from tests.support.tiny_runs import save_base


def compute_step(world: World, tree: dict[str, Any], step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gathered gradients of one step."""
    config = parse_config(tree)
    setup = build_model(ResolvedConfig(config, Path(config.base.path)))
    built = load_weights(setup, world, torch.device("cpu"))
    call = built.setup_optimizer(make_optimizer_factory(config.train, torch.device("cpu")))
    loaders = make_data_loaders(config, setup.tokenizer, world)
    assert isinstance(loaders.objective, DomainObjective)
    loaders.objective.begin_run(3)
    part = make_training_step(config.train, built, call, loaders.objective, world)
    batches, targets = loaders.train.load_step(step)
    loss = part.accumulate_gradients(step, batches, targets)
    part.close()
    gradients = {name: built.get_parameter(name).grad for name in built.adapter_names}
    return loss, {name: g.clone() for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("family", ["bert", "llama", "roberta"])
def test_gradients_are_those_of_a_plain_loop(tmp_path: Path, family: str) -> None:
    """The reversed gradient is -strength times the plain one of the loss of domains."""
    base = save_classifier_base(tmp_path / family, family)
    changes: dict[str, Any] = {"base__compute_dtype": "float32", "base__quant": None}
    tree = domain_tree(tmp_path, base, adapter={"kind": "lora", "r": 3, "alpha": 6}, **changes)
    config, step = parse_config(tree), 1
    strength = compute_reversal_strength(config.train.domain_adversarial, step, 3)
    assert 0 < strength < 0.7
    loss, found = compute_step(World(), tree, step)
    # ten lines of torch: the same model without reversal, twice
    setup = build_model(ResolvedConfig(config, Path(config.base.path)))
    built = load_weights(setup, World(), torch.device("cpu"))
    batches, targets = make_data_loaders(config, setup.tokenizer, World()).train.load_step(step)
    discriminator = next(m for m in built.model.modules() if isinstance(m, DomainDiscriminator))
    discriminator.strength = -1.0  # plain
    names = {n: built.get_parameter(n) for n in built.adapter_names}
    classes, domains, total, rows = [], [], 0, 0
    for batch in batches:
        setup.adapter.begin_micro_batch(step, batch.sample_ids)
        discriminator.last_tokens = batch.attention_mask.sum(1) - 1
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if family == "bert":
            inputs["token_type_ids"] = batch.token_types
        logits = built.model(**inputs).logits
        labels = batch.labels[:, 0]
        classes.append(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        known = batch.domains >= 0
        domains.append(
            functional.cross_entropy(
                discriminator.logits[known], batch.domains[known], reduction="sum"
            )
        )
        total, rows = total + int((labels >= 0).sum()), rows + int(known.sum())
    assert total == targets < rows == 6
    class_loss, domain_loss = sum(classes) / total, sum(domains) / rows
    assert loss == pytest.approx((class_loss + domain_loss).item(), rel=1e-5)
    plain = torch.autograd.grad(
        class_loss, list(names.values()), retain_graph=True, allow_unused=True
    )
    adverse = torch.autograd.grad(domain_loss, list(names.values()), allow_unused=True)
    reversed_ = 0
    for (name, parameter), own, other in zip(names.items(), plain, adverse, strict=True):
        own = torch.zeros_like(parameter) if own is None else own
        other = torch.zeros_like(parameter) if other is None else other
        factor = 1.0 if ".discriminator." in name else -strength
        reversed_ += int(factor < 0 and bool(other.any()))
        torch.testing.assert_close(
            found.get(name, torch.zeros_like(parameter)), own + factor * other, rtol=2e-4, atol=1e-6
        )
    assert reversed_ and any(".discriminator." in name for name in names)


def run_losses(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    found = {}
    for name, tree in trees.items():
        assert train(world, tree) == 0
        found[name] = [r.loss for r in read_metrics(Path(tree["save"]["dir"]) / "metrics.jsonl")]
    return found


@pytest.mark.dist
def test_engines_agree_and_a_stopped_run_continues(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    base = save_classifier_base(tmp_path / "bert", "bert")

    def make(name: str, **changes: Any) -> dict[str, Any]:
        tree = domain_tree(tmp_path, base, base__compute_dtype="float32", **changes)
        tree["save"] = {"dir": str(tmp_path / name), "every": 0}
        tree["train"]["eps"] = 1e-5
        return tree

    single = run_losses(World(), {"single": make("single")})["single"]
    assert len(single) == 3
    records = read_metrics(tmp_path / "single" / "metrics.jsonl")
    assert records[0].reversal_strength == 0 < records[2].reversal_strength
    assert all(0 <= r.domain_accuracy <= 1 and r.domain_loss > 0 for r in records)
    trees = {
        "fsdp2": make("fsdp2", engine={"kind": "fsdp2"}),
        "zero": make("zero", engine={"kind": "zero", "stage": 3}),
    }
    for found in run_ranks(run_losses, 3, trees):
        for name, losses in found.items():
            assert losses == pytest.approx(single, rel=2e-5), name
    tree = make("stopped")
    assert train(World(), tree, stop_after=2) == 75
    saved = {p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()}
    assert saved
    assert train(World(), tree) == 0
    continued = [r.loss for r in read_metrics(tmp_path / "stopped" / "metrics.jsonl")]
    assert continued == single
    # the public adapter has the head and not the discriminator
    public = load_file(tmp_path / "single" / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in name for name in public)
    assert not any("discriminator" in name for name in public)
    from peft import PeftModel

    plain = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    assert isinstance(PeftModel.from_pretrained(plain, tmp_path / "single" / "adapter"), nn.Module)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__domain_adversarial": None}, "needs the section train.domain_adversarial"),
        ({"one domain": True}, "at least two values"),
        ({"no labels": True}, "no source of data.train has labels"),
        ({"eval domain": True}, "held-out sources are only evaluated"),
        ({"train__domain_adversarial": {"gamma": 0}}, "gamma"),
    ],
)
def test_senseless_domains_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tree = domain_tree(tmp_path, tmp_path, **{k: v for k, v in change.items() if "__" in k})
    first, second = tree["data"]["train"]
    if "one domain" in change:
        second["domain"] = "a"
    if "no labels" in change:
        del first["labels"]
    if "eval domain" in change:
        tree["data"]["eval"][0]["domain"] = "a"
    with pytest.raises(UserError, match=words):
        parse_config(tree)


def test_validate_shows_rows_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_classifier_base(tmp_path / "bert", "bert")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(domain_tree(tmp_path, base)))
    assert cli.main(["validate", "--config", str(file)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  domain +a$", told, re.MULTILINE)
    assert re.search(r"^  domain +b, without labels$", told, re.MULTILINE) and "label none" in told


# -- the page's recipes ----------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "domain_adaptation.md").read_text()
ADVERSARIAL_RECIPE, PRETRAINING_RECIPE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(COMMANDS,) = re.findall(r"```\n(dist-peft .*?)```", PAGE, re.DOTALL)


def test_recipes_of_the_page_are_configurations() -> None:
    config = parse_config(safe_load(ADVERSARIAL_RECIPE))
    assert config.base.head == "classifier"
    assert config.train.domain_adversarial == DomainAdversarialConfig()  # the defaults are shown
    labelled, unlabelled = config.data.train
    assert labelled.labels == ["bad", "good"] and labelled.domain == "reviews"
    assert not unlabelled.labels and unlabelled.domain == "posts"
    pretraining = parse_config(safe_load(PRETRAINING_RECIPE))
    assert (pretraining.base.head, pretraining.base.quant) == ("lm", None)
    assert [source.format for source in pretraining.data.train] == ["text"]
    # a key that does not exist is found
    with pytest.raises(UserError, match=r"train\.epoch"):
        parse_config(safe_load(PRETRAINING_RECIPE.replace("epochs:", "epoch:")))


@pytest.mark.e2e
def test_pretraining_on_texts_and_a_task_on_the_merged_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's commands, in its order, with its files: the second run trains on the first's."""
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "models" / "base")
    Path("posts.txt").write_text(" ".join(f"w{4 + (7 * i) % 90}" for i in range(60)) + "\n")
    Path("domain.yaml").write_text(PRETRAINING_RECIPE)
    task = classifying_tree(tmp_path, base, adapter={"kind": "lora", "r": 3, "alpha": 6})
    Path("task.yaml").write_text(json.dumps(task))
    tiny = ["train.device=cpu", "train.global_batch=2", "data.seq_len=16"]
    for line in COMMANDS.splitlines():
        arguments = shlex.split(line)[1:]
        assert cli.main([*arguments, *(tiny if "domain.yaml" in arguments else [])]) == 0, line
        close_log()
    old, new = (
        load_file(base.parent / name / "model.safetensors") for name in ("base", "base-domain")
    )
    changed = {
        name
        for name, tensor in old.items()
        if not torch.equal(tensor.bfloat16(), new[name].bfloat16())
    }
    assert changed and all("_proj" in name for name in changed)
    stored = safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["base"]["path"].endswith("models/base-domain")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
