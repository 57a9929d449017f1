"""Prequantized directories, written by the libraries themselves or by slow reference packers."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_peft.quant.affine import AffineCodec, AffineParts
from tests.support.export_runs import llama
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import save_words

GROUP = 32


def save_plain(directory: Path, **changes: Any) -> Path:
    """A Llama of two layers whose in_features are multiples of 32, with tokenizer."""
    save_model(llama(vocab_size=97, **changes), directory, seed=4)
    save_words(directory)
    return directory


def repack(
    plain: Path,
    out: Path,
    settings: dict[str, Any],
    convert: Callable[[str, Tensor], dict[str, Tensor]],
    skip: tuple[str, ...] = (),
) -> Path:
    """Copy a base; ``convert(stem, weight)`` gives what replaces the weight of a block's linear."""
    shutil.copytree(plain, out)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(plain / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if name.endswith("proj.weight") and not name.endswith(skip):
            tensors |= {n: t.contiguous() for n, t in convert(stem, value).items()}
        else:
            tensors[name] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    set_config(out, quantization_config=settings)
    return out


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def set_config(directory: Path, **changes: Any) -> None:
    config = read_config(directory)
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def change_settings(directory: Path, **changes: Any) -> None:
    settings = read_config(directory)["quantization_config"]
    set_config(directory, quantization_config={**settings, **changes})


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> AffineParts:
    """Codes [out, in], float16 scales and zeros [out, groups]: what the formats below store."""
    codec = AffineCodec(bits, group)
    return codec.split_packed_rows(codec.quantize_to_packed(weight), weight.shape[1])


def words_of(numbers: list[int], bits: int) -> list[int]:
    """A dense stream, lowest bits first, as int32 words; by one large integer."""
    stream = sum(number << bits * place for place, number in enumerate(numbers))
    words = [stream >> 32 * i & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_rows(numbers: Tensor, bits: int) -> Tensor:
    """[n, m] -> int32 [n, ceil(m * bits / 32)]."""
    rows = [words_of([int(x) for x in row], bits) for row in numbers.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def awq_words(numbers: Tensor) -> Tensor:
    """[n, out] -> int32 [n, out / 8]; nibble ``i`` of a word has column ``order[i]`` (AutoAWQ)."""
    order, rows = (0, 2, 4, 6, 1, 3, 5, 7), []
    for row in numbers.tolist():
        eights = [row[i : i + 8] for i in range(0, len(row), 8)]
        rows.append([words_of([int(e[j]) for j in order], 4)[0] for e in eights])
    return torch.tensor(rows, dtype=torch.int32)


# -- formats ---------------------------------------------------------------------------------------


def save_own(plain: Path, out: Path, bits: int = 4, **options: Any) -> Path:
    codec = AffineCodec(bits, GROUP)
    settings = {
        "quant_method": "dist_peft",
        "kind": "int",
        "bits": bits,
        "group_size": GROUP,
        "double_quant": True,
        "solver": "rtn",
    }
    return repack(
        plain, out, settings, lambda s, w: {f"{s}.packed": codec.quantize_to_packed(w)}, **options
    )


def save_gptq(
    plain: Path,
    out: Path,
    bits: int = 4,
    *,
    version: int = 2,
    per_row: bool = False,
    act_order: bool = False,
    **options: Any,
) -> Path:
    """Version 1 stores zeros less one, subtracted as gptqmodel does: from whole words."""

    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        group = weight.shape[1] if per_row else GROUP
        columns = torch.arange(weight.shape[1])
        order = columns
        if act_order:  # as if columns became less important in some order
            seed = zlib.crc32(stem.encode())
            order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
        codes, scale, zero = rounded(weight[:, order], bits, group)
        codes = codes[:, order.argsort()]
        qzeros = pack_rows(zero.T, bits)
        if version == 1:
            ones = words_of([1] * (32 // bits), bits)[0]
            qzeros = ((qzeros.long() - ones + 2**31 & 0xFFFFFFFF) - 2**31).int()
        return {
            f"{stem}.qweight": pack_rows(codes, bits).T,
            f"{stem}.qzeros": qzeros,
            f"{stem}.scales": scale.T,
            f"{stem}.g_idx": (columns // group)[order.argsort()].int(),
        }

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if per_row else GROUP,
        "desc_act": act_order,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return repack(plain, out, settings, convert, **options)


def save_awq(plain: Path, out: Path, **options: Any) -> Path:
    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scale, zero = rounded(weight, 4)
        return {
            f"{stem}.qweight": awq_words(codes.T),
            f"{stem}.qzeros": awq_words(zero.T),
            f"{stem}.scales": scale.T,
        }

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    }
    return repack(plain, out, settings, convert, **options)


def save_compressed(
    plain: Path,
    out: Path,
    bits: int = 4,
    *,
    symmetric: bool = False,
    per_row: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """By the library's own functions: parameters, quantization and packing."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if per_row else "group",
        group_size=None if per_row else GROUP,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def convert(stem: str, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (1 if per_row else -1, -1 if per_row else GROUP))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        return {f"{stem}.{n}": t for n, t in compressor.compress(state, scheme).items()}

    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        },
        "ignore": ["lm_head"],
    }
    return repack(plain, out, settings, convert, **options)


def save_bnb(
    plain: Path, out: Path, *, double_quant: bool, kind: str = "nf4", **options: Any
) -> Path:
    """By transformers and bitsandbytes. ``kind``: nf4, fp4, or int8 for LLM.int8."""
    pytest.importorskip("bitsandbytes")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    four = kind != "int8"
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=kind if four else "nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    model = tf.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, device_map="cpu", quantization_config=settings
    )
    model.save_pretrained(out)
    save_words(out)
    return out


def save(tensors: dict[str, Tensor], directory: Path) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def copy(directory: Path, out: Path) -> Path:
    return Path(shutil.copytree(directory, out))


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of a dense bit stream, one at a time, with Python's own integers."""
    rows = []
    for row in words.view(torch.int32).tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([stream >> (bits * i) & (2**bits - 1) for i in range(len(row) * 32 // bits)])
    return torch.tensor(rows, dtype=torch.float32)
