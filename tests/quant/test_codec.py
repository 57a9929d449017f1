"""What every codec promises, and raw rows."""

import ast
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_peft.core.config.run import QuantConfig
from dist_peft.quant import packed_rows as rows
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import (
    _CODECS,
    Codec,
    RawCodec,
    get_codec_version,
    make_codec,
    make_finer_codec,
)
from dist_peft.quant.fp4 import Fp4Codec
from dist_peft.quant.fp8 import Fp8Codec
from dist_peft.quant.llm_int8 import LlmInt8Codec
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.quant.nf4 import Nf4Codec
from dist_peft.quant.nvfp4 import Nvfp4Codec

QUANTIZING: list[Codec] = [
    Nf4Codec(),
    Nf4Codec(64, double_quant=False),
    Nf4Codec(8),
    Nf4Codec(24),
    AffineCodec(2, 32),
    AffineCodec(3, 8),
    AffineCodec(3, 64),
    AffineCodec(4, 40),
    AffineCodec(8, 128),
    AffineCodec(2, 32, "hqq"),
    AffineCodec(4, 40, "hqq"),
    Mxfp4Codec(),
    Nvfp4Codec(),
    Fp8Codec(40),
    Fp8Codec(65536),
    Fp4Codec(),
    Fp4Codec(24),
    LlmInt8Codec(),
]
RAW: list[Codec] = [RawCodec(torch.bfloat16), RawCodec(torch.float16), RawCodec(torch.float32)]
CODECS = QUANTIZING + RAW
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weights(num_rows: int, in_features: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Gaussian rows of very different size, some of them zero in part."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, in_features, generator=generator)
    weight *= 10.0 ** torch.randint(-4, 3, (num_rows, 1), generator=generator)
    weight[:, : in_features // 3] *= torch.randint(0, 2, (num_rows, 1), generator=generator)
    return weight.to(dtype)


VERSIONS = {
    "nf4": (1, "4f4e9d6fc0870b8e"),
    "int": (1, "568b8d9fd6cf245b"),
    "mxfp4": (1, "d884114ba7d7ec58"),
    "fp8": (1, "b292c534a1b7684f"),
    "nvfp4": (2, "c9a5c732980b4527"),
    "fp4": (1, "3c61d1396446d044"),
    "llm_int8": (1, "3088dc0fd9d936cf"),
}
"""Kind -> ``codec_version`` and the hash of its bytes and numbers: both change, or neither."""


@pytest.mark.parametrize("kind", sorted(_CODECS))
def test_version_is_raised_with_every_change_of_bytes_or_numbers(kind: str) -> None:
    steps = torch.arange(7 * 200, dtype=torch.int64)
    weight = ((steps * 7919 % 2003 - 1001).float() / 1024).view(7, 200)  # exact in float32
    codec = make_codec(QuantConfig.model_validate({"kind": kind}), torch.bfloat16)
    packed = codec.quantize_to_packed(weight)
    found = hashlib.sha256(packed.numpy().tobytes())
    found.update(codec.dequantize_rows(packed, 200, torch.float32).numpy().tobytes())
    assert (get_codec_version(kind), found.hexdigest()[:16]) == VERSIONS[kind]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(0, 6),
    in_features=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_is_row_local_bit_for_bit(
    codec: Codec,
    num_rows: int,
    in_features: int,
    seed: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    start = data.draw(st.integers(0, num_rows))
    stop = data.draw(st.integers(start, num_rows))
    weight = weights(num_rows, in_features, seed, dtype)
    packed = codec.quantize_to_packed(weight)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, codec.num_row_bytes(in_features))
    assert torch.equal(packed[start:stop], codec.quantize_to_packed(weight[start:stop]))
    for wanted in FLOATS:
        decoded = codec.dequantize_rows(packed, in_features, wanted)
        assert decoded.dtype == wanted
        assert decoded.shape == weight.shape
        part = codec.dequantize_rows(packed[start:stop], in_features, wanted)
        assert torch.equal(decoded[start:stop], part)


@pytest.mark.parametrize("codec", QUANTIZING, ids=str)
def test_does_not_depend_on_chunks(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(37, 200, 1, torch.float32)
    packed = codec.quantize_to_packed(weight)
    decoded = codec.dequantize_rows(packed, 200, torch.bfloat16)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1000)
    assert torch.equal(codec.quantize_to_packed(weight), packed)
    assert torch.equal(codec.dequantize_rows(packed, 200, torch.bfloat16), decoded)


@pytest.mark.parametrize("codec", QUANTIZING, ids=str)
def test_temporaries_are_bounded(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                self.num_bytes = max(self.num_bytes, out.nbytes)
            return out

    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 2**16)
    weight = torch.randn(512, 1024, dtype=torch.bfloat16)  # eight chunks
    with Largest() as encoding:
        packed = codec.quantize_to_packed(weight)
    assert encoding.num_bytes <= max(packed.nbytes, 4 * rows.CHUNK_ELEMENTS)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_half_types_give_the_bytes_of_their_float32_values(codec: Codec) -> None:
    weight = weights(9, 130, 2, torch.bfloat16)
    assert torch.equal(codec.quantize_to_packed(weight), codec.quantize_to_packed(weight.float()))


@pytest.mark.parametrize("codec", QUANTIZING, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_the_float32_result_rounded(codec: Codec, dtype: torch.dtype) -> None:
    packed = codec.quantize_to_packed(weights(9, 130, 3, torch.float32))
    assert torch.equal(
        codec.dequantize_rows(packed, 130, dtype),
        codec.dequantize_rows(packed, 130, torch.float32).to(dtype),
    )


@pytest.mark.parametrize("codec", QUANTIZING, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(codec: Codec, bad: float) -> None:
    weight = torch.zeros(4, 300, dtype=torch.float16)
    weight[2, 257] = bad
    with pytest.raises(ValueError, match="not finite: NaN or infinity in row 2, columns"):
        codec.quantize_to_packed(weight)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_leaves_its_input_alone(codec: Codec) -> None:
    weight = weights(5, 128, 4, torch.float32).requires_grad_()
    before = weight.detach().clone()
    packed = codec.quantize_to_packed(weight)
    assert not packed.requires_grad
    copy = packed.clone()
    codec.dequantize_rows(packed, 128, torch.float32)
    assert torch.equal(weight, before)
    assert torch.equal(packed, copy)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decodes_from_any_alignment(codec: Codec) -> None:
    weight = weights(5, 100, 5, torch.float32)
    packed = codec.quantize_to_packed(weight)
    buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    shifted = buffer[1:].view(packed.shape)
    shifted.copy_(packed)
    decoded = codec.dequantize_rows(packed, 100, torch.float32)
    assert torch.equal(codec.dequantize_rows(shifted, 100, torch.float32), decoded)
    assert torch.equal(codec.dequantize_rows(shifted[3:4], 100, torch.float32), decoded[3:4])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_zeros_stay_zeros(codec: Codec) -> None:
    decoded = codec.dequantize_rows(codec.quantize_to_packed(torch.zeros(3, 70)), 70, torch.float32)
    assert torch.equal(decoded, torch.zeros(3, 70))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_wrong_tensors_are_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="floating-point matrix"):
        codec.quantize_to_packed(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="floating-point matrix"):
        codec.quantize_to_packed(torch.zeros(4))
    with pytest.raises(ValueError, match=f"rows of codec {codec.name} with in_features=64"):
        codec.dequantize_rows(codec.quantize_to_packed(torch.zeros(4, 256)), 64, torch.float32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_is_a_value(codec: Codec) -> None:
    twin = pickle.loads(pickle.dumps(codec))
    assert twin == codec
    assert hash(twin) == hash(codec)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_cuda_gives_the_same_bits(codec: Codec) -> None:
    weight = weights(70, 300, 6, torch.bfloat16)
    packed = codec.quantize_to_packed(weight)
    assert torch.equal(codec.quantize_to_packed(weight.cuda()).cpu(), packed)
    for dtype in FLOATS:
        decoded = codec.dequantize_rows(packed.cuda(), 300, dtype)
        assert torch.equal(decoded.cpu(), codec.dequantize_rows(packed, 300, dtype))


def test_make_codec_follows_the_config() -> None:
    assert make_codec(None, torch.float16) == RawCodec(torch.float16)
    assert make_codec(QuantConfig(), torch.bfloat16) == Nf4Codec(64, True)
    quant = QuantConfig(kind="nf4", group_size=128, double_quant=False)
    assert make_codec(quant, torch.bfloat16) == Nf4Codec(128, False)
    quant = QuantConfig(kind="int", bits=3, group_size=32)
    assert make_codec(quant, torch.bfloat16) == AffineCodec(3, 32)
    for solver, codec in (("hqq", AffineCodec(4, 64, "hqq")), ("gptq", AffineCodec(4, 64))):
        quant = QuantConfig(kind="int", solver=solver)
        assert make_codec(quant, torch.bfloat16) == codec
    names = [codec.name for codec in (RawCodec(), Nf4Codec(), AffineCodec(2), AffineCodec(8))]
    assert names == ["raw", "nf4", "int2", "int8"]


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (RawCodec(torch.bfloat16), 8192),
        (RawCodec(torch.float32), 16384),
        (Nf4Codec(64), 2048 + 8 + 64),
        (Nf4Codec(64, double_quant=False), 2048 + 4 * 64),
        (Nf4Codec(32), 2048 + 8 + 128),
        (AffineCodec(8, 64), 4096 + 4 * 64),
        (AffineCodec(4, 64), 2048 + 4 * 64),
        (AffineCodec(3, 64), 1536 + 4 * 64),
        (AffineCodec(2, 64), 1024 + 4 * 64),
        (AffineCodec(2, 32), 1024 + 4 * 128),
    ],
    ids=str,
)
def test_row_bytes_of_4096_weights(codec: Codec, expected: int) -> None:
    assert codec.num_row_bytes(4096) == expected


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_row_bytes_are_words(codec: Codec) -> None:
    assert all(codec.num_row_bytes(n) % 4 == 0 for n in range(1, 600))


def test_raw_decodes_without_a_copy() -> None:
    codec = RawCodec(torch.bfloat16)
    weight = torch.randn(6, 33, dtype=torch.bfloat16)
    packed = codec.quantize_to_packed(weight)
    decoded = codec.dequantize_rows(packed, 33, torch.bfloat16)
    assert torch.equal(decoded, weight)
    assert decoded.data_ptr() == packed.data_ptr()
    assert packed[:, 66:].eq(0).all()


def test_raw_keeps_what_is_not_finite_but_refuses_overflow() -> None:
    weight = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf]])
    codec = RawCodec(torch.float16)
    decoded = codec.dequantize_rows(codec.quantize_to_packed(weight), 4, torch.float32)
    assert torch.equal(decoded.nan_to_num(), weight.half().float().nan_to_num())
    assert RawCodec(torch.float16).quantize_to_packed(
        torch.tensor([[65504.0, -65504.0]])
    ).shape == (1, 4)
    weight[0, 0] = -70000.0
    with pytest.raises(ValueError, match=r"weight -70000 in row 0, column 0 .* torch.float16"):
        codec.quantize_to_packed(weight)


def test_raw_needs_a_float_type() -> None:
    with pytest.raises(ValueError, match=r"floating-point type, not torch\.int8"):
        RawCodec(torch.int8)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_a_codec_knows_its_facts(codec: Codec) -> None:
    packed = codec.quantize_to_packed(weights(3, 65, 1, torch.float32))
    statistics = codec.read_statistics(packed, 65)
    assert codec.is_quantized == (codec in QUANTIZING) == bool(statistics.shape[1])
    assert len(statistics) == 3 and bool(statistics.isfinite().all())
    assert (codec.affine_rows is None) == (not codec.name.startswith("int"))
    assert (codec.nf4_rows is None) == (codec.name != "nf4")
    assert (codec.fp8_rows is None) == (codec.name != "fp8")
    assert (codec.mxfp4_rows is None) == (codec.name != "mxfp4")
    if codec.affine_rows is not None:
        parts = codec.affine_rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, torch.cat((parts.scale, parts.zero), 1))
        integers = bool((parts.zero == parts.zero.round()).all())
        assert codec.affine_rows.has_integer_zeros == integers
        assert codec.affine_rows.bits in (2, 3, 4, 8)
    if codec.fp8_rows is not None:
        numbers, scales = codec.fp8_rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, scales) and numbers.shape == (3, 65)
        assert numbers.dtype == torch.float8_e4m3fn
        assert scales.shape[1] == codec.fp8_rows.count_groups(65)
    if codec.mxfp4_rows is not None:
        payload, exponents = codec.mxfp4_rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, torch.exp2(exponents.float() - 127))
        assert payload.shape == (3, 16 * exponents.shape[1])
    assert (codec.nvfp4_rows is None) == (codec.name != "nvfp4")
    assert (codec.fp4_rows is None) == (codec.name != "fp4")
    assert (codec.int8_rows is None) == (codec.name != "llm_int8")
    assert codec.ordered_rows is None and (codec.grid_rows is None) == (not codec.is_quantized)
    if codec.nvfp4_rows is not None:
        payload, stored, divisor = codec.nvfp4_rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, stored.float() / divisor) and payload.shape == (3, 40)
    if codec.int8_rows is not None:
        numbers, largest = codec.int8_rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, largest.unsqueeze(1)) and numbers.dtype == torch.int8
    if (rows := codec.nf4_rows or codec.fp4_rows) is not None:
        payload, scales = rows.split_packed_rows(packed, 65)
        assert torch.equal(statistics, scales)
        assert payload.shape[1] * 2 == scales.shape[1] * rows.group_size


def _names(node: ast.AST) -> set[str]:
    """Last parts of all names in an expression."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _find_codec_switch(node: ast.AST) -> str | None:
    """What a node decides by the class or the name of a codec; None: nothing."""
    if isinstance(node, ast.Call) and _names(node.func) & {"isinstance", "issubclass"}:
        found = [name for name in _names(node.args[1]) if name.endswith("Codec")]
        return f"isinstance of {found[0]}" if found else None
    if isinstance(node, ast.MatchClass):
        found = [name for name in _names(node.cls) if name.endswith("Codec")]
        return f"case {found[0]}" if found else None
    if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
            if not isinstance(side, ast.Attribute):
                continue
            owner = _names(side.value)
            if side.attr == "kind" and owner & {"quant", "quant_config"}:
                return "comparison of quant.kind"
            if side.attr == "name" and any(name.endswith("codec") for name in owner):
                return "comparison of codec.name"
    return None


def _find_codec_switches(source: str) -> list[str]:
    """The switches of a file with their lines; most files have no word of them."""
    if not any(word in source for word in ("Codec", "codec", ".kind")):
        return []
    return [
        f"{getattr(node, 'lineno', 0)}: {switch}"
        for node in ast.walk(ast.parse(source))
        if (switch := _find_codec_switch(node))
    ]


def test_nothing_is_decided_by_the_class_or_name_of_a_codec() -> None:
    """A new codec would be forgotten there: ask it for its facts."""
    samples = (
        "isinstance(x.codec, AffineCodec)",
        "isinstance(x, (int, quant.Nf4Codec))",
        "base.quant.kind in ('nf4', 'int')",
        "'nf4' == quant.kind",
        "module.codec.name == 'raw'",
        "match codec:\n    case RawCodec():\n        pass",
    )
    for sample in samples:
        assert _find_codec_switches(sample), sample
    package = Path(__file__).parents[2] / "dist_peft"
    found = [
        f"{path.relative_to(package)}:{switch}"
        for path in sorted(package.rglob("*.py"))
        for switch in _find_codec_switches(path.read_text())
    ]
    assert not found


def test_the_finer_codec_has_the_groups_of_another() -> None:
    assert make_finer_codec(AffineCodec(2, 16, "hqq")) == AffineCodec(8, 16)
    assert make_finer_codec(Nf4Codec(64, double_quant=False)) == AffineCodec(8, 64)
    with pytest.raises(ValueError, match="raw have no groups"):
        make_finer_codec(RawCodec())
