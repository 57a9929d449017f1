import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config as PeftIa3Config
from peft import PeftModel, get_peft_model
from torch import Tensor

from dist_peft.adapters.adapter_format import find_format
from dist_peft.adapters.directory import read_adapter_directory, write_adapter_directory
from dist_peft.adapters.ia3.format import Ia3Format, read_rescalings
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import Ia3Config
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, disturb, gathered, ids, save, tiny_llama

V = "base_model.model.model.layers.0.self_attn.v_proj.ia3_l"
DOWN = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"


def public(**changes: Any) -> PublicAdapter:
    """A small adapter of PEFT's form; ``config`` or ``tensors`` in place of its own."""
    config = {
        "peft_type": "IA3",
        "target_modules": ["v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    tensors = {V: torch.full((5, 1), 2.0), DOWN: torch.full((1, 7), 3.0)}
    return PublicAdapter(
        {**config, **changes.get("config", {})}, {**tensors, **changes.get("tensors", {})}
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        # one layer alone: last components would mean the other layer, too
        {"target_modules": [r".*layers\.1.*down_proj", "v_proj"]},
        # PEFT would take the ending up_proj for this, and so for all of these
        {"target_modules": ["up_proj", "gate_proj"], "feedforward_modules": ["0.mlp.up_proj"]},
        {"feedforward_modules": []},
    ],
    ids=str,
)
def test_peft_loads_the_same_function(settings: dict[str, Any], tmp_path: Path) -> None:
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, method=Ia3Config, **settings)
    disturb(model)
    theirs = PeftModel.from_pretrained(
        copy.deepcopy(original), save(model, adapter, tmp_path)
    ).eval()
    with torch.no_grad():
        found, expected = theirs(input_ids=ids()).logits, model(ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    changed = sum("ia3_l" in name for name, _ in theirs.named_parameters())
    assert changed == len(read_adapter_directory(tmp_path).tensors)


def test_pefts_own_directory_is_read(tmp_path: Path) -> None:
    config = PeftIa3Config(
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(tiny_llama(), config)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    vectors = read_rescalings(read_adapter_directory(tmp_path))
    assert len(vectors) == 4
    for path, own in vectors.items():
        assert own.rescales_input == path.endswith("down_proj")
        expected = theirs.get_parameter(f"base_model.model.{path}.ia3_l.default")
        assert torch.equal(own.vector, expected.detach().flatten())


def test_written_and_read_again(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), method=Ia3Config)
    disturb(model)
    written = adapter.to_public_adapter(gathered(model), "tiny/base")
    write_adapter_directory(tmp_path, written, {})
    read = read_adapter_directory(tmp_path)
    assert read.config == {**written.config, "peft_version": read.config["peft_version"]}
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in written.tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensors": {DOWN: torch.ones(7, 1)}},
            r"down_proj\.ia3_l has shape \[7, 1\], not \[1",
        ),
        ({"tensors": {V: torch.ones(1, 5)}}, r"v_proj\.ia3_l has shape \[1, 5\], not \[out, 1\]"),
        ({"tensors": {V: torch.ones(5)}}, r"has shape \[5\], not \[out, 1\]"),
        ({"tensors": {V: torch.ones(0, 1)}}, r"v_proj\.ia3_l is empty: .* saved without its data"),
        ({"tensors": {"base_model.model.x.lora_A.weight": torch.ones(1)}}, "is no IA3 tensor"),
        ({"tensors": {V: torch.full((5, 1), torch.nan)}}, "holds nan"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "trained with modules_to_save"),
        ({"config": {"feedforward_modules": ".*down.*"}}, r"is '\.\*down\.\*'; only a list"),
        ({"config": {"feedforward_modules": None}}, "feedforward_modules is None; only a list"),
    ],
)
def test_damaged_adapters_are_refused(
    changes: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=f"refusing to write a damaged adapter: .*{message}"):
        write_adapter_directory(tmp_path / "adapter", public(**changes), {})
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_without_tensors_is_refused() -> None:
    with pytest.raises(UserError, match="has no tensors"):
        read_rescalings(replace(public(), tensors={}))


def test_type_is_found_and_described() -> None:
    config = public().config
    assert isinstance(find_format(config), Ia3Format)
    assert Ia3Format().describe(config) == "IA3 feedforward_modules=down_proj"
    many = {"feedforward_modules": [f"layers.{i}.down_proj" for i in range(9)]}
    assert re.search(r"layers\.2\.down_proj and 6 more$", Ia3Format().describe(many))
    assert Ia3Format().describe({}) == "IA3 feedforward_modules=none"
    assert Ia3Format().explain_no_peft_form(config) is None


def test_half_precision_is_read_as_float32() -> None:
    value: Tensor = torch.full((5, 1), 1.5, dtype=torch.float16)
    own = read_rescalings(public(tensors={V: value}))["model.layers.0.self_attn.v_proj"]
    assert own.vector.dtype == torch.float32 and own.vector.tolist() == [1.5] * 5
