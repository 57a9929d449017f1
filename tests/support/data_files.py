"""Small inputs for the tests of dist_peft.data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.data.cache import DocumentWriter, TokenDocuments
from dist_peft.data.document_batch import DocumentBatch, EncodedDocuments
from dist_peft.data.examples import Example
from dist_peft.data.files import RecordPlace, open_source
from dist_peft.data.sources import read_examples


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


def append_document(
    writer: DocumentWriter, tokens: NDArray[Any], mask: NDArray[Any], place: RecordPlace
) -> None:
    """Append one document without a label."""
    lengths, numbers, classes = (np.array([n]) for n in (len(tokens), place.number, -1))
    encoded = EncodedDocuments(tokens.astype(np.int32), mask.astype(np.uint8), lengths)
    writer.append_documents(DocumentBatch(encoded, place.file, numbers, classes))


def build_examples(directory: Path, records: Sequence[Any], **source: Any) -> list[Example]:
    """Return the examples of ``records`` written to a.jsonl; ``source`` are further settings."""
    found = DataSource(path=str(write_jsonl(directory / "a.jsonl", records)), **source)
    key = "data.train[0]"
    return [example for _, example in read_examples(found, open_source(found, key), key)]
