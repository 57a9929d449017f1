"""Damaged bases: configuration, weights and tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.case import (
    Row,
    both,
    copy,
    cut,
    edit_header,
    edit_json,
    edit_tensors,
    fifo,
    link,
    records,
    remove,
    write,
)

CONFIG = "base/config.json"
WEIGHTS = "base/model.safetensors"
INDEX = "base/model.safetensors.index.json"
TOKENIZER = "base/tokenizer.json"
NORM = "model.norm.weight"
ADDED_TOKEN = edit_json(
    TOKENIZER,
    added_tokens=[
        {
            "id": 97,
            "content": "[added]",
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": True,
        }
    ],
)


def _config(name: str, *words: str, **values: Any) -> Row:
    return Row(name, "train", words, edit_json(CONFIG, **values))


def _header(name: str, *words: str, **values: Any) -> Row:
    """A row whose header describes one tensor otherwise."""
    damage = edit_header(WEIGHTS, lambda header: header[NORM].update(values))
    return Row(name, "inspect base", ("model.safetensors", *words), damage)


def _index(tree: Any) -> Any:
    """An index, instead of the single file, with ``tree`` as its contents."""

    def damage(root: Path) -> None:
        (root / WEIGHTS).rename(root / "base/model-00001-of-00001.safetensors")
        (root / INDEX).write_text(tree if isinstance(tree, str) else json.dumps(tree))

    return damage


def _prefix(length: int) -> Any:
    return lambda root: (root / WEIGHTS).write_bytes(
        length.to_bytes(8, "little") + (root / WEIGHTS).read_bytes()[8:]
    )


ROWS = [
    # -- config.json
    Row("config missing", "train", ("no config.json", "base.path"), remove(CONFIG)),
    Row(
        "config deep nesting",
        "train",
        ("config.json is damaged", "recursion"),
        write(CONFIG, "[" * 100_000),
    ),
    Row("config a FIFO", "train", ("config.json", "named pipe"), fifo(CONFIG)),
    _config("model_type missing", "model_type", model_type=...),
    _config("model_type nonsense", "nonsense", model_type="nonsense"),
    _config("hidden_size -64", "config.json", "hidden_size", hidden_size=-64),
    _config("hidden_size 0", "config.json", "hidden_size", hidden_size=0),
    _config("heads 0", "config.json", "num_attention_heads 0", num_attention_heads=0),
    _config("heads -4", "config.json", "num_attention_heads -4", num_attention_heads=-4),
    _config("key heads 0", "config.json", "num_key_value_heads 0", num_key_value_heads=0),
    _config("hidden_size another", "config.json", "shape", hidden_size=32),
    _config("vocab_size -1", "config.json", "vocab_size", vocab_size=-1),
    _config("layers 10**9", "config.json", "num_hidden_layers", num_hidden_layers=10**9),
    _config("layers 0", "config.json", "num_hidden_layers", num_hidden_layers=0),
    _config("layers one more", "model.layers.2", num_hidden_layers=3),
    _config("activation nonsense", "sigmoidish", hidden_act="sigmoidish"),
    _config("rope type nonsense", "spiral", rope_parameters={"rope_type": "spiral", "factor": 2.0}),
    _config("quantization nonsense", "quant_method", quantization_config={"quant_method": "magic"}),
    _config(
        "fp8 tiles of one number",
        "weight_block_size",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128]},
    ),
    _config("mxfp4 without blocks", "_blocks", quantization_config={"quant_method": "mxfp4"}),
    _config(
        "experts 10**9",
        "num_local_experts",
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        num_local_experts=10**9,
    ),
    # -- weights
    Row("weights missing", "train", ("no *.safetensors file",), remove(WEIGHTS)),
    Row(
        "weights a pickle alone",
        "train",
        ("pytorch_model.bin", "safetensors"),
        both(remove(WEIGHTS), write("base/pytorch_model.bin", b"x")),
    ),
    Row("weights a FIFO", "train", ("model.safetensors", "regular file"), fifo(WEIGHTS)),
    Row(
        "weights a device",
        "train",
        ("model.safetensors", "regular file"),
        link(WEIGHTS, "/dev/zero"),
    ),
    Row(
        "weights cut",
        "train",
        ("model.safetensors is truncated", "copy or download"),
        cut(WEIGHTS, -100),
    ),
    Row(
        "weights cut within the header",
        "train",
        ("model.safetensors is truncated",),
        cut(WEIGHTS, 100),
    ),
    Row(
        "weights a git-lfs pointer",
        "train",
        ("git lfs pull",),
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Row("header length 2**63", "inspect base", ("header", "100 MB"), _prefix(2**63)),
    _header("shape negative", "shape", shape=[-64]),
    _header("shape huge", "data_offsets", shape=[2**62, 2**62]),
    _header("offsets beyond the file", "data_offsets", data_offsets=[0, 2**60]),
    _header("offsets of another tensor", "overlaps", data_offsets=[0, 256]),
    _header("type nonsense", "F99", "convert", dtype="F99"),
    Row(
        "header deep nesting",
        "inspect base",
        ("header is not valid JSON",),
        write(WEIGHTS, (100_000).to_bytes(8, "little") + b"[" * 100_000),
    ),
    Row(
        "header entry a number",
        "inspect base",
        ("lacks dtype, shape",),
        edit_header(WEIGHTS, lambda h: h.update(x=5)),
    ),
    Row(
        "tensor missing",
        "train",
        ("lacks 1 tensors", "model.norm.weight"),
        edit_tensors(WEIGHTS, lambda t: t.pop(NORM)),
    ),
    Row(
        "tensor of another shape",
        "train",
        (NORM, "shape"),
        edit_tensors(WEIGHTS, lambda t: t.update({NORM: torch.ones(3)})),
    ),
    Row(
        "tensor of another type",
        "train",
        (NORM, "int64"),
        edit_tensors(WEIGHTS, lambda t: t.update({NORM: torch.ones(64).long()})),
    ),
    Row(
        "tensor of NaN",
        "train",
        ("q_proj", "finite"),
        edit_tensors(
            WEIGHTS, lambda t: t["model.layers.0.self_attn.q_proj.weight"].fill_(float("nan"))
        ),
    ),
    Row(
        "index of a missing shard",
        "train",
        ("model-00002", "missing"),
        _index({"weight_map": {NORM: "model-00002-of-00002.safetensors"}}),
    ),
    Row(
        "index outside of the base",
        "train",
        ("index.json", "../train.jsonl"),
        _index({"weight_map": {NORM: "../train.jsonl"}}),
    ),
    Row("index without a map", "train", ("index.json", "weight_map"), _index({"metadata": {}})),
    Row("index deep nesting", "train", ("index.json",), _index("[" * 100_000)),
    Row(
        "tensor in two shards",
        "train",
        ("again in",),
        both(
            copy(WEIGHTS, "base/a.safetensors"),
            lambda root: (root / WEIGHTS).rename(root / "base/b.safetensors"),
        ),
    ),
    # -- tokenizer
    Row(
        "tokenizer missing",
        "train",
        ("tokenizer of base", "instantiate"),
        remove(TOKENIZER, "base/tokenizer_config.json"),
    ),
    Row("tokenizer a FIFO", "train", ("tokenizer.json", "regular file"), fifo(TOKENIZER)),
    Row("tokenizer deep nesting", "train", ("tokenizer.json",), write(TOKENIZER, '{"a":' * 50_000)),
    Row(
        "tokenizer model nonsense",
        "train",
        ("tokenizer of base", "ModelUntagged"),
        edit_json(TOKENIZER, "model", type="Nonsense"),
    ),
    Row(
        "tokenizer vocabulary a list",
        "train",
        ("tokenizer of base", "invalid type: sequence"),
        edit_json(TOKENIZER, "model", vocab=["w0"]),
    ),
    Row(
        "tokenizer normalizer nonsense",
        "train",
        ("tokenizer of base", "NormalizerUntagged"),
        edit_json(TOKENIZER, normalizer={"type": "Nonsense"}),
    ),
    Row(
        "tokenizer without end token",
        "train",
        ("eos_token", "stop"),
        edit_json("base/tokenizer_config.json", eos_token=None),
    ),
    Row(
        "tokenizer of a larger model",
        "train",
        ("98 tokens with ids up to 97", "embeddings for 97", "vocab_size"),
        edit_json(TOKENIZER, "model", "vocab", w97=97),
    ),
    Row(
        "tokenizer with an id far beyond",
        "train",
        ("ids up to 1,000,000", "embeddings for 97"),
        edit_json(TOKENIZER, "model", "vocab", w50=1_000_000),
    ),
    Row(
        "tokenizer with an added token in the data",
        "train",
        ("data.train has token 97", "resize_token_embeddings"),
        both(ADDED_TOKEN, records("train.jsonl", {"prompt": "w9 ", "completion": "[added]"})),
    ),
    # -- the same through other commands
    Row(
        "layers 10**9, planned",
        "plan",
        ("config.json", "num_hidden_layers"),
        edit_json(CONFIG, num_hidden_layers=10**9),
    ),
    Row(
        "weights cut, quantized",
        "quantize",
        ("model.safetensors is truncated",),
        cut(WEIGHTS, -100),
    ),
]
