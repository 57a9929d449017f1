import json
from pathlib import Path

import pytest
import torch

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.engine.single import SingleEngine
from dist_peft.model.experts import ExpertStack
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.model.sparse_base import list_base_tensors, write_sparse_base
from dist_peft.store.index import SafetensorsIndex
from dist_peft.store.reader import RowReader
from tests.support.packed_floats import GPT_OSS, save_fp8, save_mxfp4, save_tokenized
from tests.support.tiny_models import CONFIGS, MIXTURES, save_model


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "qwen3", "mixtral"])
def test_headers_and_shapes_are_those_of_the_real_files(tmp_path: Path, family: str) -> None:
    save_model((CONFIGS | MIXTURES)[family], tmp_path / "real", dtype=torch.bfloat16)
    sparse = write_sparse_base(tmp_path / "real/config.json", tmp_path / "sparse")
    real = build_skeleton(BaseConfig(path="x"), tmp_path / "real")
    built = build_skeleton(BaseConfig(path="x"), sparse)
    expected = {n: (p.shape, p.dtype) for n, p in real.model.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in built.model.named_parameters()} == expected
    sizes = [sum(s.num_bytes for s in k.tensors.values()) for k in (real, built)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_prequantized_headers_are_those_of_the_real_files(kind: str, tmp_path: Path) -> None:
    """Names, types and shapes of every tensor but the type of those that are not packed."""
    if kind == "mxfp4":
        plain = save_tokenized(GPT_OSS, tmp_path / "plain")
        real = save_mxfp4(plain, tmp_path / "real")
    else:
        plain = save_tokenized(MIXTURES["qwen3_moe"], tmp_path / "plain")
        real = save_fp8(plain, tmp_path / "real", (24, 32))
    sparse = write_sparse_base(real / "config.json", tmp_path / "sparse", dtype=torch.float32)
    shapes = [
        {name: (info.dtype, info.shape) for name, info in SafetensorsIndex.open(d).tensors.items()}
        for d in (real, sparse)
    ]
    assert shapes[0] == shapes[1]
    built = build_skeleton(BaseConfig(path="x"), sparse)
    assert built.prequantized is not None and built.prequantized.quant_config.kind == kind


def test_a_mixture_in_integers_is_loaded(tmp_path: Path) -> None:
    """Codes and scales are zero, the shapes of the weights are not."""
    group = {"weights": {"num_bits": 4, "group_size": 8, "symmetric": True, "type": "int"}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }
    config = MIXTURES["qwen3_moe"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    sparse = write_sparse_base(file, tmp_path / "sparse")
    skeleton = build_skeleton(BaseConfig(path="x"), sparse)
    engine = SingleEngine(torch.device("cpu"))
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, torch.device("cpu"))
        assert reader.bytes_read == sum(t.num_bytes for t in skeleton.index.tensors.values())
    stacks = [m for m in skeleton.model.modules() if isinstance(m, ExpertStack)]
    assert len(stacks) == 2  # the first block has none
    assert (
        not stacks[0]
        .codec.dequantize_rows(stacks[0].packed, stacks[0].in_features, torch.float32)
        .any()
    )


def test_files_are_holes_that_can_be_read(tmp_path: Path) -> None:
    config = save_model(CONFIGS["llama"], tmp_path / "real").config
    sparse = write_sparse_base(tmp_path / "real/config.json", tmp_path / "s", shard_bytes=40_000)
    index = SafetensorsIndex.open(sparse)
    assert len(index.files) > 3
    assert sum(f.stat().st_blocks for f in index.files) * 512 < 64 * 1024
    with RowReader(index) as reader:
        rows = reader.read_rows("model.embed_tokens.weight", Span(2, 5))
    assert rows.shape == (3, config.hidden_size) and not rows.any()
    assert {s.dtype for s in list_base_tensors(sparse / "config.json")} == {torch.bfloat16}


def test_a_config_of_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="cannot use"):
        write_sparse_base(tmp_path / "config.json", tmp_path / "out")
