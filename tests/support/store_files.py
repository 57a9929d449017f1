"""Hand-made safetensors files, and strategies for random tensors and spans."""

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dist_peft.store.format import DTYPES

# the library's own reader has no torch type for F8_E8M0
LIBRARY_DTYPES = [dtype for dtype in DTYPES.values() if dtype != torch.float8_e8m0fnu]
INDEX = "model.safetensors.index.json"


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bytes at all (NaN payloads included); of bool, zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(high, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8
).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn, max_size: int = 6) -> dict[str, Tensor]:
    keys = draw(st.lists(names, unique=True, max_size=max_size))
    return {
        key: random_tensor(draw(st.sampled_from(LIBRARY_DTYPES)), draw(shapes), seed)
        for seed, key in enumerate(keys)
    }


def write_raw(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header (bytes as they are, else as JSON) and any header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text + data)
    return file


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def save_sharded(directory: Path, *shards: dict[str, Tensor]) -> Path:
    """Shards and their index json, as ``transformers`` names them."""
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory
