"""bitsandbytes NF4 as transformers saves it: the same weights, bit for bit, and the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export.verify_bitsandbytes import patch_bitsandbytes_layers
from dist_peft.model.prequantized.bnb import BitsandbytesFormat
from dist_peft.quant.fp4 import Fp4Codec
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from tests.support import packed
from tests.support.prequantized_models import linears, load, logits

bnb = pytest.importorskip("bitsandbytes")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in_features of 64, and of 96, where a block runs from one row into the next."""
    return packed.save_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def nested(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_bnb(plain, tmp_path_factory.mktemp("bnb") / "nested", double_quant=True)


@pytest.fixture(scope="module")
def simple(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes stored as bfloat16, as FSDP wants them; one linear is left alone."""
    return packed.save_bnb(
        plain,
        tmp_path_factory.mktemp("bnb") / "simple",
        double_quant=False,
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "v_proj"],
    )


@pytest.mark.parametrize("which", ["nested", "simple"])
def test_weights_and_logits_of_bitsandbytes(which: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(which)
    model = tf.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").eval()
    patch_bitsandbytes_layers(model)
    skeleton = load(directory)
    assert torch.equal(logits(skeleton.model), logits(model))
    found = linears(skeleton)
    for weight, linear in found.items():
        own = model.get_submodule(weight.removesuffix(".weight"))
        if linear.codec.name == "raw":
            assert weight.endswith("v_proj.weight") and not isinstance(own, bnb.nn.Linear4bit)
            continue
        if isinstance(own, bnb.nn.Linear4bit):
            wanted = bnb.functional.dequantize_4bit(own.weight.data, own.weight.quant_state)
        else:
            wanted = own.weight
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted)
        assert linear.codec == Nf4Codec(64 if linear.in_features == 64 else 32, False)
    codecs = {linear.codec.name for linear in found.values()}
    assert codecs == ({"nf4"} if which == "nested" else {"nf4", "raw"})


@pytest.mark.parametrize(("kind", "double_quant"), [("fp4", True), ("fp4", False), ("int8", False)])
def test_weights_of_other_kinds(kind: str, double_quant: bool, plain: Path, tmp_path: Path) -> None:
    """As bitsandbytes dequantizes them, bit for bit."""
    directory = packed.save_bnb(plain, tmp_path / "base", double_quant=double_quant, kind=kind)
    model = tf.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").eval()
    patch_bitsandbytes_layers(model)
    skeleton = load(directory)
    for weight, linear in linears(skeleton).items():
        own: Any = model.get_submodule(weight.removesuffix(".weight"))
        if kind == "int8":
            assert isinstance(own, bnb.nn.Linear8bitLt)
            wanted = bnb.functional.int8_vectorwise_dequant(own.weight.data, own.weight.SCB)
            assert linear.codec == LlmInt8Codec()
        else:
            wanted = own.weight
            if isinstance(own, bnb.nn.Linear4bit):
                wanted = bnb.functional.dequantize_4bit(wanted.data, wanted.quant_state)
            assert linear.codec == Fp4Codec(64 if linear.in_features == 64 else 32)
        assert torch.equal(linear.dequantize_weight(torch.float32), wanted.float())
    assert skeleton.prequantized is not None
    assert skeleton.prequantized.quant_config.kind == ("fp4" if kind == "fp4" else "llm_int8")


@pytest.mark.parametrize("double_quant", [True, False])
def test_any_rows_of_a_large_weight(double_quant: bool, tmp_path: Path) -> None:
    """Several second-level blocks, and rows that begin inside a block: 40 in_features."""
    weight = torch.randn(700, 40, generator=torch.Generator().manual_seed(0)) * 0.02
    data, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double_quant, blocksize=64
    )
    wanted = bnb.functional.dequantize_4bit(data, state)
    tensors = {"a.weight": data, **{f"a.weight.{k}": v for k, v in state.as_dict(True).items()}}
    packed.save(tensors, tmp_path)
    index = SafetensorsIndex.open(tmp_path)
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    linear = BitsandbytesFormat.from_settings(settings, index).open_linear(index, "a", 700, 40)
    with RowReader(index) as reader:
        for span in (Span(0, 700), Span(0, 1), Span(411, 413), Span(3, 650), Span(9, 9)):
            rows = linear.codec.dequantize_rows(
                linear.read_packed_rows(reader, span), 40, torch.float32
            )
            assert torch.equal(rows, wanted[span.slice])


def drop(ending: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(Q_PROJ + ending)


def state(old: bytes, new: bytes) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        text = bytes(tensors[name].tolist()).replace(old, new)
        tensors[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()

    return change


def other_levels(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.quant_map"][3] += 0.01


def fewer_blocks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.absmax"] = tensors[f"{Q_PROJ}.absmax"][::2].contiguous()


@pytest.mark.parametrize(
    ("settings", "change", "text"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, None, r"no tensor \*.SCB"),
        ({"bnb_4bit_quant_type": "af4"}, None, "bitsandbytes af4; nf4 and fp4 are read"),
        ({"bnb_4bit_use_double_quant": False}, None, r"absmax .* is uint8 .* it is float32 \["),
        ({}, drop(".quant_map"), "no .*quant_map: it is incomplete"),
        ({}, drop(".quant_state.bitsandbytes__nf4"), "no .*bitsandbytes__nf4: it is incomplete"),
        ({}, fewer_blocks, r"absmax .* is uint8 \[32\], but .* uint8 \[64\]"),
        ({}, other_levels, "other levels than NF4"),
        ({}, state(b'"blocksize": 64', b'"blocksize": 65'), "has blocksize 65, not 64"),
        ({}, state(b"{", b"["), "quant_state is damaged"),
    ],
)
def test_refused(
    settings: dict[str, Any],
    change: Callable[[dict[str, Tensor]], Any] | None,
    text: str,
    nested: Path,
    tmp_path: Path,
) -> None:
    directory = packed.copy(nested, tmp_path / "base")
    packed.change_settings(directory, **settings)
    if change is not None:
        packed.change_tensors(directory, change)
    with pytest.raises(UserError, match=text):
        load(directory)
