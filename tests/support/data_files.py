"""Small inputs for the tests of dist_peft.data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dist_peft.core.config.run import DataConfig
from dist_peft.data.cache import TokenDocuments


def byte_tokenizer(*, bos: bool = True, specials: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the bytes and the merges "bc" and "de"."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merged in ("bc", "de"):
        vocab[merged] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, [("b", "c"), ("d", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *specials])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def data_config(cache: Path, **settings: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"train": ["unused.jsonl"], "cache_dir": str(cache), **settings}
    )


def documents(
    masks: Sequence[Sequence[int]], *, is_text: bool = False, first: int = 0
) -> TokenDocuments:
    """Documents with the given loss masks and tokens first, first + 1, ... over all of them."""
    lengths = [len(mask) for mask in masks]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenDocuments(
        tokens=np.arange(first, first + offsets[-1], dtype=np.int32),
        mask=np.asarray([m for mask in masks for m in mask], dtype=np.uint8),
        offsets=offsets,
        places=np.asarray([[0, i + 1] for i in range(len(masks))], dtype=np.int64),
        files=("made.jsonl",),
        is_text=is_text,
        notes=(),
        digest=str(hash(tuple(map(tuple, masks)))),
    )
