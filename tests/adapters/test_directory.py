import copy
import importlib.metadata
import json
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dist_peft.adapters.directory import (
    PEFT_VERSION,
    keeps_zeros_of_base,
    open_adapter_merger,
    open_merger,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.lora.tensors import parse_lora_tensors
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from tests.support.adapters import adapted, disturb, ids, int_codec, save, tiny_llama
from tests.support.lora_models import VARIANTS

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def load_with_peft(original: nn.Module, directory: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys, ignored settings
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own renamings
        return PeftModel.from_pretrained(copy.deepcopy(original), directory).eval()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_peft_computes_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    original = tiny_llama(bias=True)
    model, adapter = adapted(original, r=4, alpha=6, **settings)
    disturb(model)
    model.eval()
    peft_model = load_with_peft(original, save(model, adapter, tmp_path))
    with torch.no_grad():
        ours, theirs, bare = model(ids()).logits, peft_model(ids()).logits, original(ids()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 0.05


def test_peft_computes_the_same_with_a_tied_head(tmp_path: Path) -> None:
    original = tiny_llama(tied=True)
    model, adapter = adapted(original, r=4, embeddings=True)
    disturb(model)
    save(model, adapter, tmp_path)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        peft_model = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
    torch.testing.assert_close(model(ids()).logits, peft_model(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"embeddings": True}])
def test_names_are_pefts_own(settings: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), r=4, **settings)
    ours = adapter_tensors(save(model, adapter, tmp_path / "ours"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if settings.get("embeddings"):
        targets.append("embed_tokens")
    config = PeftLoraConfig(
        r=4,
        target_modules=targets,
        use_dora=settings.get("use_dora", False),
        task_type="CAUSAL_LM",
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "peft")
    theirs = adapter_tensors(tmp_path / "peft")
    theirs.pop("base_model.model.model.embed_tokens.base_layer.weight", None)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def adapter_tensors(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "adapter_model.safetensors")


# -- round trip ------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), int_codec(2), r=4, init="loftq", init_iterations=2)
    disturb(model)
    directory = save(model, adapter, tmp_path / "new" / "adapter")
    public = read_adapter_directory(directory)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert public.facts == {"start": "loftq"}
    assert torch.equal(
        public.extra["model.layers.0.self_attn.q_proj.removed_A"], layer.removed_A.detach()
    )
    A, B = public.tensors[f"{Q}.lora_A.weight"], public.tensors[f"{Q}.lora_B.weight"]
    assert torch.equal(A, torch.cat([layer.lora_A, layer.start_A]))
    assert torch.equal(B, torch.cat([layer.lora_B, -layer.start_B], 1))
    found = parse_lora_tensors(public)["model.layers.0.self_attn.q_proj"]
    assert found.scaling == pytest.approx(layer.spec.scaling)
    assert public.config["r"] == 8
    assert public.config["base_model_name_or_path"] == "tiny/base"
    about = read_adapter_metadata(directory)
    names = safetensors.torch.load_file(directory / "adapter_model.safetensors").keys()
    extra = safetensors.torch.load_file(directory / "dist_peft.safetensors").keys()
    assert about.pop("tensors") == sorted([*names, *extra])
    assert about.pop("adapter_config") == public.config
    assert about == {"base": "tiny/base", "adapter": {"start": "loftq"}}
    assert sorted(p.name for p in directory.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "dist_peft.json",
        "dist_peft.safetensors",
    ]


def test_adapters_that_keep_zeros(tmp_path: Path) -> None:
    assert not keeps_zeros_of_base(tmp_path)
    for name, expected in (("LORA", False), ("MASKED_LORA", True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
        assert keeps_zeros_of_base(tmp_path) == expected


def test_an_older_extra_file_does_not_stay(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), int_codec(2), r=4, init="loftq", init_iterations=2)
    save(model, adapter, tmp_path)
    model, adapter = adapted(tiny_llama(), int_codec(2), r=4, init="loftq", init_iterations=1)
    save(model, adapter, tmp_path)
    assert read_adapter_directory(tmp_path).extra == {}


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), r=4, alpha=8.0, init="pissa")
    text = (save(model, adapter, tmp_path) / "adapter_config.json").read_text()
    assert '"lora_alpha": 16,' in text


def test_pefts_directory_is_read(tmp_path: Path) -> None:
    config = PeftLoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "embed_tokens"],
        rank_pattern={"k_proj": 2},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    public = read_adapter_directory(tmp_path)
    assert public.facts == {}
    found = parse_lora_tensors(public)
    assert len(found) == 5
    k = found["model.layers.1.self_attn.k_proj"]
    assert (k.A.shape, k.B.shape, k.scaling) == ((2, 32), (16, 2), 6 / 2**0.5)
    embedding = found["model.embed_tokens"]
    assert embedding.is_embedding
    assert torch.equal(embedding.saved_base, tiny_llama().model.embed_tokens.weight)


# -- what is refused -------------------------------------------------------------------------------


def public(**config: Any) -> PublicAdapter:
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)}
    return PublicAdapter(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": False, **config}, tensors
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_A.weight", torch.ones(0, 32), "lora_A.weight is empty"),
        ("lora_A.weight", torch.ones(3, 32), r"lora_A.weight has shape \[3, 32\], not \[4, \*\]"),
        ("lora_B.weight", torch.ones(32), r"lora_B.weight has shape \[32\], not \[\*, 4\]"),
        ("lora_B.weight", None, "lora_B.weight is absent"),
        (
            "lora_magnitude_vector",
            torch.ones(31),
            r"lora_magnitude_vector has shape \[31\], not \[32\]",
        ),
        ("vera_lambda", torch.ones(3), "vera_lambda is no LoRA tensor"),
    ],
)
def test_damaged_tensors(name: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    adapter = public()
    adapter.tensors.pop(f"{Q}.{name}", None)
    if value is not None:
        adapter.tensors[f"{Q}.{name}"] = value
    with pytest.raises(UserError, match=f"q_proj.{message}"):
        parse_lora_tensors(adapter)
    with pytest.raises(RuntimeError, match=f"refusing to write a damaged adapter: .*{message}"):
        write_adapter_directory(tmp_path, adapter, {})
    assert not list(tmp_path.iterdir())


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the adapter has no tensors"):
        write_adapter_directory(tmp_path, PublicAdapter(public().config, {}), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained with modules_to_save"),
        ({"bias": "all"}, "trained with bias"),
        ({"lora_bias": True}, "trained with lora_bias"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"changed base \(init_lora_weights: pissa_niter_4",
        ),
        ({"init_lora_weights": "loftq"}, "changed base"),
    ],
)
def test_more_than_lora(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_lora_tensors(public(**config))


def test_harmless_starts_are_read() -> None:
    for start in (True, False, "gaussian", "eva", "orthogonal"):
        parse_lora_tensors(public(init_lora_weights=start))


def test_dora_on_an_embedding() -> None:
    adapter = public(use_dora=True)
    adapter.tensors.clear()
    path = "base_model.model.model.embed_tokens"
    adapter.tensors[f"{path}.lora_embedding_A"] = torch.ones(4, 9)
    adapter.tensors[f"{path}.lora_embedding_B"] = torch.ones(6, 4)
    adapter.tensors[f"{path}.lora_magnitude_vector.weight"] = torch.ones(6)
    with pytest.raises(UserError, match=r"model\.embed_tokens: DoRA on an embedding"):
        parse_lora_tensors(adapter)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_config\.json; give the directory"):
        read_adapter_directory(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        read_adapter_directory(tmp_path)
    config.write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_adapter_directory(tmp_path)
    config.write_text(json.dumps({"peft_type": "BONE"}))
    with pytest.raises(
        UserError,
        match="peft_type is 'BONE'; only LORA, QALORA, MASKED_LORA, VERA, LOHA, LOKR, ADALORA",
    ):
        read_adapter_directory(tmp_path)
    config.write_text(json.dumps(public().config))
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        read_adapter_directory(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle, which can run code"):
        read_adapter_directory(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        read_adapter_directory(tmp_path)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make directory"):
        write_adapter_directory(tmp_path / "file" / "adapter", public(), {})


PROMPT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 3,
    "token_dim": 5,
}


def test_a_refusal_names_the_directory(tmp_path: Path) -> None:
    public = PublicAdapter(PROMPT, {"prompt_embeddings": torch.ones(3, 5)})
    write_adapter_directory(tmp_path / "adapter", public, {})
    with pytest.raises(UserError, match=r"adapter: the adapter is PROMPT_TUNING: virtual tokens"):
        open_adapter_merger(tmp_path / "adapter")


def test_trained_weights_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "dist_peft.json").write_text('{"kind": "full"}')
    with ExitStack() as stack, pytest.raises(UserError, match="safetensors"):
        open_merger(tmp_path, {}, stack, tied=False)


def test_version_of_the_format_is_that_of_the_tests(tmp_path: Path) -> None:
    model, adapter = adapted(tiny_llama(), r=4)
    directory = save(model, adapter, tmp_path)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_version"] == PEFT_VERSION == importlib.metadata.version("peft")
