from pathlib import Path

import numpy as np
import pytest

from dist_peft.data.cache import load_or_build_documents
from dist_peft.data.document_batch import DocumentBatch, EncodedDocuments
from dist_peft.data.document_writer import DocumentWriter


def make_batch(file: str, lengths: list[int], first: int = 1) -> DocumentBatch:
    total = sum(lengths)
    encoded = EncodedDocuments(
        np.arange(total, dtype=np.int32), np.ones(total, np.uint8), np.array(lengths, np.int64)
    )
    numbers = np.arange(first, first + len(lengths))
    return DocumentBatch(encoded, file, numbers, np.full(len(lengths), -1))


def test_the_size_of_batches_makes_no_difference(tmp_path: Path) -> None:
    def build_whole(writer: DocumentWriter) -> None:
        writer.append_documents(make_batch("a", [2, 3, 1]))
        writer.append_documents(make_batch("b", []))
        writer.append_documents(make_batch("b", [4], 7))
        assert len(writer) == 4

    def build_singly(writer: DocumentWriter) -> None:
        encoded = make_batch("a", [2, 3, 1]).documents
        for number, (tokens, mask) in enumerate(encoded, start=1):
            one = EncodedDocuments(tokens, mask, np.array([len(tokens)]))
            writer.append_documents(DocumentBatch(one, "a", np.array([number]), np.array([-1])))
        writer.append_documents(make_batch("b", [4], 7))

    whole = load_or_build_documents(tmp_path, "whole", build_whole)
    load_or_build_documents(tmp_path, "singly", build_singly)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "singly" / name).read_bytes()
    assert [str(whole.get_place(i)) for i in range(4)] == [
        *(f"a, record {n}" for n in (1, 2, 3)),
        "b, record 7",
    ]


def test_an_empty_document_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        load_or_build_documents(
            tmp_path, "key", lambda writer: writer.append_documents(make_batch("a", [2, 0]))
        )
    assert not list(tmp_path.iterdir())
