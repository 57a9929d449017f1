"""Prequantized directories of every format: decoded as their own library does, read by shares."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_peft.core.config.run import LoraConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import row_span
from dist_peft.core.world import World
from dist_peft.model.prequantized.base import PrequantizedBase, open_prequantized
from dist_peft.quant.codec import make_codec
from dist_peft.store.index import SafetensorsIndex
from tests.support import packed
from tests.support.dist import run_ranks
from tests.support.prequantized_models import base_of, fill, linears, load, logits

INT4 = QuantConfig(kind="int", bits=4, group_size=packed.GROUP)
INT3 = QuantConfig(kind="int", bits=3, group_size=packed.GROUP)

Save = Callable[[Path, Path], Path]
SAME_CODES: dict[str, tuple[Save, QuantConfig]] = {
    "own": (packed.save_own, INT4),
    "gptq": (lambda p, o: packed.save_gptq(p, o, version=1), INT4),
    "gptq_v2, 3 bits": (lambda p, o: packed.save_gptq(p, o, 3), INT3),
    "awq": (packed.save_awq, INT4),
}
"""Directories with the codes that ``encode`` gives for the plain weights."""
OTHERS: dict[str, Save] = {
    "compressed": packed.save_compressed,
    "compressed, 3 bits": lambda p, o: packed.save_compressed(p, o, 3, symmetric=True),
    "bnb": lambda p, o: packed.save_bnb(p, o, double_quant=True),
    "bnb fp4": lambda p, o: packed.save_bnb(p, o, double_quant=False, kind="fp4"),
    "bnb int8": lambda p, o: packed.save_bnb(p, o, double_quant=False, kind="int8"),
    "act-order": lambda p, o: packed.save_gptq(p, o, act_order=True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def bases(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    saves = {name: save for name, (save, _) in SAME_CODES.items()} | OTHERS
    return {name: save(plain, root / name.replace(" ", "")) for name, save in saves.items()}


# -- what is decoded -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME_CODES)
def test_packed_rows_are_those_of_encoding(name: str, bases: dict[str, Path], plain: Path) -> None:
    quant = SAME_CODES[name][1]
    skeleton = load(bases[name])
    assert skeleton.prequantized is not None and skeleton.prequantized.quant_config == quant
    encoded = load(plain, quant=quant)
    assert encoded.prequantized is None
    found, wanted = linears(skeleton), linears(encoded)
    assert len(found) == 14 and found.keys() == wanted.keys()
    for weight, linear in found.items():
        assert linear.codec == wanted[weight].codec and torch.equal(
            linear.packed, wanted[weight].packed
        )
    assert torch.equal(logits(skeleton.model), logits(encoded.model))
    assert skeleton.tensors.keys() == encoded.tensors.keys()
    assert skeleton.prequantized.describe_scale_rounding() is None


def test_one_scale_a_row(plain: Path, tmp_path: Path) -> None:
    """GPTQ's group_size -1: in_features of 64 and 96 are both cut into groups of 32."""
    skeleton = load(packed.save_gptq(plain, tmp_path / "base", per_row=True))
    files = load_file(plain / "model.safetensors")
    for weight, linear in linears(skeleton).items():
        assert linear.codec == make_codec(INT4, torch.float32)
        whole = make_codec(
            QuantConfig(kind="int", bits=4, group_size=linear.in_features), torch.float32
        )
        wanted = whole.dequantize_rows(
            whole.quantize_to_packed(files[weight]), linear.in_features, torch.float32
        )
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted)


@pytest.mark.parametrize("own", ["nf4", "int3"])
def test_own_rows_of_other_codecs(own: str, plain: Path, tmp_path: Path) -> None:
    quant = QuantConfig() if own == "nf4" else QuantConfig(kind="int", bits=3, group_size=64)
    codec = make_codec(quant, torch.float32)
    settings = {"quant_method": "dist_peft", **quant.model_dump(mode="json")}
    packed.repack(
        plain,
        tmp_path / "base",
        settings,
        lambda s, w: {f"{s}.packed": codec.quantize_to_packed(w)},
    )
    skeleton = load(tmp_path / "base")
    assert skeleton.prequantized is not None and skeleton.prequantized.quant_config == quant
    assert torch.equal(logits(skeleton.model), logits(load(plain, quant=quant).model))


def test_linears_that_the_directory_left_alone(plain: Path, tmp_path: Path) -> None:
    packed.save_own(plain, tmp_path / "base", skip=("v_proj.weight", "1.mlp.up_proj.weight"))
    files, found = load_file(plain / "model.safetensors"), linears(load(tmp_path / "base"))
    raw = {name for name, linear in found.items() if linear.codec.name == "raw"}
    assert raw == {n for n in files if n.endswith(("v_proj.weight", "1.mlp.up_proj.weight"))}
    for name in raw:
        assert found[name].stored is None
        assert torch.equal(found[name].dequantize_weight(torch.float32), files[name])


# -- who reads what --------------------------------------------------------------------------------

WHOLE = (
    ".g_idx",
    ".weight_shape",
    ".quant_map",
    ".nested_quant_map",
    "bitsandbytes__nf4",
    "bitsandbytes__fp4",
    ".weight_format",
)
"""Small tensors that each rank reads."""


def share(directory: Path, plain: Path, ranks: int, rank: int) -> tuple[float, int]:
    """Bytes of a rank's part, and at most of the words at its ends that hold others' rows too."""
    outs = {name: len(value) for name, value in load_file(plain / "model.safetensors").items()}
    word = 12 if "3bits" in directory.name else 4  # of 3-bit codes, 3 words hold whole ones
    part, edges = 0.0, 0
    for name, value in load_file(directory / "model.safetensors").items():
        if name.endswith(WHOLE):
            part += value.nbytes
            continue
        weight = next(n for n in outs if name.startswith(n.removesuffix("weight")))
        part += value.nbytes * len(row_span(outs[weight], ranks, rank)) / outs[weight]
        if name.endswith(".qzeros") or (directory.name == "awq" and name.endswith(".qweight")):
            edges += 2 * word * len(value)
        elif name.endswith(".weight_zero_point"):
            edges += 2 * word * value.shape[1]
        elif name.endswith("absmax"):
            edges += 2 * value.itemsize
    return part, edges


def fill_all(world: World, bases: dict[str, Path]) -> dict[str, tuple[int, dict[str, Tensor]]]:
    results = {}
    for name, directory in bases.items():
        skeleton, count = fill(world, base_of(directory))
        local = {
            weight: (p.to_local() if isinstance(p := linear.packed, DTensor) else p).detach()
            for weight, linear in linears(skeleton).items()
        }
        results[name] = count, local
    return results


@pytest.mark.dist
def test_each_rank_reads_its_rows_and_packs_what_one_packs(
    bases: dict[str, Path], plain: Path
) -> None:
    whole = fill_all(World(), bases)
    for ranks in (2, 3):
        parts = run_ranks(fill_all, ranks, bases)
        for name, (count, weights) in whole.items():
            for weight, value in weights.items():
                joined = torch.cat([part[name][1][weight] for part in parts])
                assert torch.equal(joined, value), (ranks, name, weight)
            for rank, part in enumerate(parts):
                own, edges = share(bases[name], plain, ranks, rank)
                assert part[name][0] <= own + edges, (name, ranks, rank)
                if name == "own":
                    assert part[name][0] == own
            print(f"{name}, {ranks} ranks: {count} bytes, {[part[name][0] for part in parts]}")


def test_one_rank_reads_every_byte_once(bases: dict[str, Path]) -> None:
    for name, directory in bases.items():
        size = sum(t.nbytes for t in load_file(directory / "model.safetensors").values())
        if name == "act-order":  # the order of columns is read when the model is built
            tensors = load_file(directory / "model.safetensors")
            size -= sum(t.nbytes for n, t in tensors.items() if n.endswith(".g_idx"))
        assert fill(World(), base_of(directory))[1] == size, name


# -- base.quant ------------------------------------------------------------------------------------


def test_stated_as_the_directory_has_it(bases: dict[str, Path]) -> None:
    load(bases["own"], quant=INT4)
    load(bases["awq"], quant=QuantConfig(kind="int", group_size=32))
    load(bases["bnb"], quant={"kind": "nf4"})
    load(bases["bnb"], quant={"kind": "nf4", "double_quant": True, "group_size": 64})


@pytest.mark.parametrize(
    ("name", "quant", "text"),
    [
        ("own", None, r"base\.quant is null, but .*\(dist_peft: int, 4 bits, group_size 32, "),
        ("gptq", {"kind": "nf4"}, r"base\.quant\.kind is nf4, but .*\(gptq: int, 4 bits"),
        ("own", {"kind": "int", "group_size": 32, "solver": "hqq"}, "solver is hqq, but .* rtn"),
        ("awq", {"kind": "int", "group_size": 64}, r"group_size is 64, but .* group_size 32"),
        ("compressed", {"kind": "int", "bits": 3}, r"bits is 3, but .*int, 4 bits"),
        ("bnb", {"kind": "nf4", "double_quant": False}, r"double_quant is False, but .*double_q"),
    ],
)
def test_stated_otherwise(
    name: str, quant: dict[str, Any] | None, text: str, bases: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=text):
        load(bases[name], quant=quant)


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_starts_that_change_the_base(init: Any, bases: dict[str, Path]) -> None:
    text = rf"adapter\.init {init} .*q_proj comes quantized from base\.path; set adapter\.init"
    with pytest.raises(UserError, match=text):
        fill(World(), base_of(bases["own"]), LoraConfig(r=2, init=init))


def test_dora_starts_from_the_decoded_rows(bases: dict[str, Path]) -> None:
    """Not from rows that were encoded once more."""
    found, _ = fill(World(), base_of(bases["compressed"]), LoraConfig(r=2, use_dora=True))
    bare = linears(load(bases["compressed"]))
    for path, linear in linears(found).items():
        assert torch.equal(linear.packed, bare[path].packed)
        wrapper = found.model.get_submodule(path.removesuffix(".weight"))
        norm = linear.dequantize_weight(torch.float32).double().square().sum(1).sqrt().float()
        torch.testing.assert_close(wrapper.magnitude.detach(), norm, rtol=1e-6, atol=0)
    assert torch.equal(logits(found.model), logits(found.model))


# -- what is refused -------------------------------------------------------------------------------


def opened(directory: Path) -> PrequantizedBase | None:
    return open_prequantized(directory, SafetensorsIndex.open(directory))


def test_unquantized(plain: Path) -> None:
    assert opened(plain) is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'; read are dist_peft, gptq, awq, bits"),
        ({"bits": 4}, "quant_method None"),
        ("gptq", r"config\.json: quantization_config is 'gptq', not a section"),
        ({"quant_method": "awq", "bits": 4}, r"\(awq\), but has no tensor \*\.qweight; remove"),
        ({"quant_method": "dist_peft", "kind": "int", "bits": 5}, r"config\.json: quant.*bits"),
        ({"quant_method": "dist_peft", "kind": "nf4", "group_size": 12}, "not a multiple of 8"),
    ],
    ids=str,
)
def test_settings_that_are_not_read(settings: Any, text: str, plain: Path, tmp_path: Path) -> None:
    packed.repack(plain, tmp_path / "base", settings, lambda s, w: {f"{s}.weight": w})
    with pytest.raises(UserError, match=text):
        opened(tmp_path / "base")


def test_settings_beside_the_configuration(plain: Path, tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ wrote them."""
    saved = {
        "quantize_config.json": packed.save_gptq(plain, tmp_path / "gptq", version=1),
        "quant_config.json": packed.save_awq(plain, tmp_path / "awq"),
    }
    for name, directory in saved.items():
        settings = packed.read_config(directory)["quantization_config"]
        del settings["quant_method"]
        packed.set_config(directory, quantization_config=None)
        (directory / name).write_text(json.dumps(settings))
        found = load(directory).prequantized
        assert found is not None and found.quant_config == INT4
    (plain / "quantize_config.json").write_text("{}")
    assert opened(plain) is None
    (plain / "quantize_config.json").unlink()


def test_packed_head_and_embedding(plain: Path, tmp_path: Path) -> None:
    for name in ("lm_head", "model.embed_tokens"):
        directory = packed.save_own(plain, tmp_path / name)

        def pack(tensors: dict[str, Tensor], name: str = name) -> None:
            codec = make_codec(INT4, torch.float32)
            tensors[f"{name}.packed"] = codec.quantize_to_packed(tensors.pop(f"{name}.weight"))

        packed.change_tensors(directory, pack)
        text = rf"has {name}\.weight quantized \(dist_peft\), which is no linear of a block"
        with pytest.raises(UserError, match=text):
            load(directory)


def test_own_rows_of_another_width(plain: Path, tmp_path: Path) -> None:
    directory = packed.save_own(plain, tmp_path / "base")
    packed.change_settings(directory, bits=3)
    with pytest.raises(UserError, match=r"proj\.packed .* is uint8 \[\d+, 40\], but by config"):
        load(directory)


def test_damaged_scale(plain: Path, tmp_path: Path) -> None:
    directory = packed.save_own(plain, tmp_path / "base")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.packed"][70, -1] = 0x7C

    packed.change_tensors(directory, spoil)
    text = r"layers\.1\.mlp\.up_proj in rows 0 to 95: a scale is not finite.*row 70"
    with pytest.raises(UserError, match=text):
        load(directory)


def test_layers_that_the_configuration_drops(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = packed.save_own(plain, tmp_path / "base")
    packed.set_config(directory, num_hidden_layers=1)
    skeleton = load(directory)
    assert "has 7 weights that a LlamaForCausalLM of this config.json does not use" in caplog.text
    assert len(linears(skeleton)) == 7 and not any(
        ".1." in n for n in skeleton.tensors if "proj" in n
    )


def test_headless_names(plain: Path, tmp_path: Path) -> None:
    directory = packed.save_own(plain, tmp_path / "base")
    wanted = logits(load(directory).model)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    packed.change_tensors(directory, strip)
    assert torch.equal(logits(load(directory).model), wanted)


def test_transformers_sees_an_unquantized_model(bases: dict[str, Path]) -> None:
    skeleton = load(bases["bnb"])
    assert isinstance(skeleton.model, tf.LlamaForCausalLM)
    assert not hasattr(skeleton.model_config, "quantization_config")
