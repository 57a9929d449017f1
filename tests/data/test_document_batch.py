import numpy as np

from dist_peft.data.document_batch import EncodedDocuments


def test_documents_follow_each_other() -> None:
    tokens, mask = np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 0, 1], np.uint8)
    encoded = EncodedDocuments(tokens, mask, np.array([2, 1, 3]))
    assert len(encoded) == 3
    parts = [(t.tolist(), m.tolist()) for t, m in encoded]
    assert parts == [([0, 1], [0, 1]), ([2], [1]), ([3, 4, 5], [0, 0, 1])]
