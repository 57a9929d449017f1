import logging
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_peft.app.data_setup import (
    PROBE_TOKENS,
    DataLoaders,
    check_loaders_fit_model,
    make_data_loaders,
)
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError
from dist_peft.core.world import World
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.skeleton import build_skeleton
from tests.support.dist import run_ranks
from tests.support.tiny_models import CONFIGS, save_model
from tests.support.tiny_runs import tiny_tree


def loaders(tree: dict[str, Any], world: World) -> DataLoaders:
    config = parse_config(tree)
    return make_data_loaders(config, load_tokenizer(Path(config.base.path)), world)


def test_rows_and_probe(tmp_path: Path) -> None:
    found = loaders(tiny_tree(tmp_path), World())
    assert len(found.train.rows) == 8
    assert found.eval is not None and len(found.eval.rows) == 3
    tokens, _, _ = found.eval.rows.get_sequence(0)  # the probe is held out where it can be
    assert torch.equal(found.probe, torch.as_tensor(tokens[:PROBE_TOKENS])[None])
    assert found.probe.dtype == torch.long and found.probe.shape[1] > 4


def test_probe_without_held_out_data(tmp_path: Path) -> None:
    found = loaders(tiny_tree(tmp_path, data__eval=[]), World())
    assert found.eval is None
    tokens, _, _ = found.train.rows.get_sequence(0)
    assert torch.equal(found.probe[0], torch.as_tensor(tokens[:PROBE_TOKENS]).long())


def refusals(world: World, tree: dict[str, Any]) -> list[str]:
    texts = []
    one_record = [{"path": tree["data"]["train"][0], "limit": 1}]
    for section, change in (
        ("train", {"global_batch": 1}),
        ("train", {"global_batch": 3}),
        ("data", {"train": one_record}),
    ):
        try:
            loaders({**tree, section: {**tree[section], **change}}, world)
            texts.append("")
        except UserError as error:
            texts.append(str(error))
    return texts


@pytest.mark.dist
def test_more_ranks_than_rows_are_refused_on_every_rank(tmp_path: Path) -> None:
    for batch, uneven, rows in run_ranks(refusals, 2, tiny_tree(tmp_path)):
        assert "2 ranks but only 1 train.global_batch" in batch
        assert "at most 1 processes or enlarge train.global_batch" in batch
        assert uneven == ""
        assert "2 ranks but only 1 rows in data.train" in rows


def test_batch_that_does_not_divide_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0, 2, 0, 2, "test", "127.0.0.1", 1)
    monkeypatch.setattr(World, "any_rank", lambda self, flag: flag)  # the other rank is imagined
    with caplog.at_level(logging.WARNING, "dist_peft"):
        loaders(tiny_tree(tmp_path), world)
        assert "no multiple" not in caplog.text
        loaders(tiny_tree(tmp_path, train__global_batch=3), replace(world))
        first = caplog.text
        caplog.clear()
        both = {"global_batch": 6, "micro_batch": 4}
        tree = tiny_tree(tmp_path)
        loaders({**tree, "train": {**tree["train"], **both}}, replace(world, size=3))
    assert (
        "the 3 sequences of train.global_batch make 3 micro-batches of at most 1, which is no "
        "multiple of 2 ranks: some ranks idle in each step; set train.global_batch to a multiple "
        "of 2"
    ) in first
    assert "make 2 micro-batches of at most 4, which is no multiple of 3 ranks" in caplog.text
    assert "set train.micro_batch to 2" in caplog.text


def test_missing_held_out_file_is_told_before_training_data_are_tokenized(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, data__eval=[str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match=r"data\.eval\[0\]: file .*none\.jsonl does not exist"):
        loaders(tree, World())
    assert not list((tmp_path / "cache").rglob("*.*"))


class TestFit:
    def test_tokens_without_embedding(self, tmp_path: Path) -> None:
        tree = tiny_tree(tmp_path)
        found = loaders(tree, World())
        skeleton = build_skeleton(parse_config(tree).base, tmp_path / "base")
        extra = 0
        skeleton.model_config.vocab_size = found.train.rows.largest_token + 1
        check_loaders_fit_model(found, skeleton, extra)
        skeleton.model_config.vocab_size -= 1
        with pytest.raises(UserError, match=r"data\.train has token \d+ but the base has"):
            check_loaders_fit_model(found, skeleton, extra)

    @pytest.mark.parametrize("extra", [0, 3])
    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_positions(
        self,
        family: str,
        packing: bool,
        extra: int,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        tree = tiny_tree(tmp_path, data__packing=packing)
        found = loaders(tree, World())
        save_model(CONFIGS[family], tmp_path / "base")
        skeleton = build_skeleton(parse_config(tree).base, tmp_path / "base")
        learned = family == "opt"
        # the padding of a packed row has positions too, up to data.seq_len
        needed = extra + (16 if learned and packing else found.train.rows.longest)
        skeleton.model_config.max_position_embeddings = needed
        caplog.clear()  # an earlier test of this process may have set the level to INFO
        with caplog.at_level(logging.WARNING, "dist_peft"):
            check_loaders_fit_model(found, skeleton, extra)
            assert caplog.text == ""
            skeleton.model_config.max_position_embeddings = needed - 1
            if not learned:
                check_loaders_fit_model(found, skeleton, extra)
                words = (
                    f"longest document needs {needed} positions, the base was made for {needed - 1}"
                )
                assert words in caplog.text
                return
            words = f"needs {needed} positions but the base has learned {needed - 1}"
            with pytest.raises(UserError, match=words):
                check_loaders_fit_model(found, skeleton, extra)


def test_sequences_are_filled_up_with_the_end_of_text(tmp_path: Path) -> None:
    """Not with the padding token, whose embedding may be zero: Gemma 3n has no gradient there."""
    tree = tiny_tree(tmp_path)
    tokenizer = load_tokenizer(Path(tree["base"]["path"]))
    tokenizer.pad_token, tokenizer.eos_token = "w4", "w5"
    found = make_data_loaders(parse_config(tree), tokenizer, World())
    assert found.train.pad_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_padding_token_without_an_embedding(tmp_path: Path) -> None:
    """Added to the tokenizer alone, as often; padding is never attended to."""
    tree = tiny_tree(tmp_path)
    tokenizer = load_tokenizer(Path(tree["base"]["path"]))
    config = parse_config(tree)
    found = make_data_loaders(config, tokenizer, World())
    skeleton = build_skeleton(config.base, Path(tree["base"]["path"]))
    found.train.pad_id = skeleton.vocabulary_size
    check_loaders_fit_model(found, skeleton, 0)
    assert found.train.pad_id == 0
    found.train.pad_id = skeleton.vocabulary_size
    with pytest.raises(UserError, match=r"padding token .* has id 97, .* for 97 tokens"):
        check_loaders_fit_model(found, replace(skeleton, head=mock.Mock()), 0)
