"""An adapter is the same function here, in PEFT's own classes and merged, written by either."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dist_peft.adapters.directory import (
    open_adapter_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.span import row_span
from tests.support.adapters import adapted, disturb, ids, save, tiny_llama

__all__ = ["check_loaded_by_peft", "check_merged", "check_read_from_peft", "merge_whole"]


def merge_whole(directory: Path, model: nn.Module, parts: int = 3) -> dict[str, Tensor]:
    """All weights of ``model`` with the adapter in them, merged in ``parts`` pieces."""
    merger = open_adapter_merger(directory)
    weights = model.state_dict()
    merger.check_weight_shapes(
        {n: (v.shape[0], v.shape[1]) for n, v in weights.items() if v.dim() > 1}
    )
    for name, value in weights.items():
        if merger.changes_weight(name):
            spans = [row_span(len(value), parts, part) for part in range(parts)]
            rows = [merger.merge_weight_rows(name, value[s.slice], s, "original") for s in spans]
            weights[name] = torch.cat(rows)
    assert merger.list_unused_tensors() == []
    return weights


def check_merged(directory: Path, original: nn.Module, expected: Tensor) -> None:
    """The merged model computes ``expected``, and its weights do not depend on the pieces."""
    ours = merge_whole(directory, original)
    once = merge_whole(directory, original, parts=1)
    assert all(torch.equal(value, once[name]) for name, value in ours.items())
    fresh = copy.deepcopy(original)
    fresh.load_state_dict(ours)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids()).logits, expected, rtol=2e-5, atol=2e-5)


def check_loaded_by_peft(directory: Path, method: type[Any], **settings: Any) -> PublicAdapter:
    """What is written here computes the same in PEFT and merged; returns it as read again."""
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, method=method, **settings)
    with torch.no_grad():
        plain = original(ids()).logits
        torch.testing.assert_close(model(ids()).logits, plain, rtol=1e-5, atol=1e-5)
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            copy.deepcopy(original), save(model, adapter, directory)
        ).eval()
    with torch.no_grad():
        expected = model(ids()).logits
        assert not torch.allclose(plain, expected, rtol=1e-2)
        torch.testing.assert_close(theirs(input_ids=ids()).logits, expected, rtol=2e-5, atol=2e-5)
    check_merged(directory, original, expected)
    public = read_adapter_directory(directory)
    written = {name.replace(".default", "") for name in theirs.state_dict()}
    assert public.tensors.keys() <= written
    return public


def check_read_from_peft(directory: Path, config: peft.PeftConfig) -> PublicAdapter:
    """What PEFT's own model saves is read here, merges to its function, and is written again."""
    original = tiny_llama(bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(original), config).eval()
        disturb(theirs)
        theirs.save_pretrained(directory)
    with torch.no_grad():
        expected = theirs(input_ids=ids()).logits
        assert not torch.allclose(original(ids()).logits, expected, rtol=1e-2)
    check_merged(directory, original, expected)
    public = read_adapter_directory(directory)
    write_adapter_directory(directory / "again", public, {})
    check_merged(directory / "again", original, expected)
    return public
