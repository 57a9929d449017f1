"""Tokenize the records of a source, chunk by chunk, in this process or in several.

The first chunks are tokenized here: they determine the format of the source and how its tokenizer
is called, and a small source needs no other process. After ``_SERIAL_SECONDS`` of CPU time further
chunks are sent to forked processes, which parse, render and tokenize; this one reads the files and
writes the documents, in the order of the records. Later chunks do not depend on each other, so the
documents, notes and errors are the same for any number of processes.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import numpy as np

from dist_peft.data.document_batch import DocumentBatch, EncodedDocuments
from dist_peft.data.examples import Example, LabelledExample
from dist_peft.data.files import RecordChunk, RecordPlace
from dist_peft.data.sources import ExampleReader
from dist_peft.data.tally import Tally
from dist_peft.data.worker_pool import count_usable_cores, map_in_processes

__all__ = ["Encoder", "SourceTokenizer"]

_SERIAL_SECONDS = 1.0
"""CPU time before processes are forked, which takes about a tenth of that."""

_MOST_PROCESSES = 16
"""By default; then the process that reads and writes has as much to do as one of them."""


class Encoder(Protocol):
    """Tokenizes examples."""

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """Counts over the examples so far."""

    def begin_chunk(self) -> None:
        """Forget state that depends on the process in which earlier examples were encoded."""

    def encode_examples(
        self, examples: Sequence[Example], places: Sequence[RecordPlace]
    ) -> EncodedDocuments:
        """Return the documents of the examples, which are all of one class."""


class SourceTokenizer:
    """Tokenize the records of one source.

    Attributes:
        reader: builds the examples.
    """

    def __init__(self, reader: ExampleReader, encoder: Encoder) -> None:
        self.reader = reader
        self._encoder = encoder

    def tokenize_chunks(
        self, chunks: Iterator[RecordChunk], processes: int | None
    ) -> Generator[DocumentBatch, None, None]:
        """Yield the documents of each chunk, in order.

        Args:
            processes: at most; None: one for each core that this process may use, at most 16.

        Raises:
            UserError: see ``sources``, ``chat``; a worker process was killed.
            StopRequested: a signal has reached this process.
        """
        if processes is None:
            processes = min(count_usable_cores(), _MOST_PROCESSES)
        began, count = time.process_time(), 0
        for chunk in chunks:
            batch = self._tokenize_chunk(chunk)
            count += len(batch.documents)
            yield batch
            # without a document the format or the way to tokenize may still be open
            if count and processes > 1 and time.process_time() - began >= _SERIAL_SECONDS:
                break
        else:
            return
        counted = self._tallies
        results = map_in_processes(self._tokenize_apart, chunks, processes)
        for batch, tallies in results:
            for own, more in zip(counted, tallies, strict=True):
                own.add(more)
            yield batch

    @property
    def _tallies(self) -> tuple[Tally, ...]:
        return (*self.reader.tallies, *self._encoder.tallies)

    def _tokenize_apart(self, chunk: RecordChunk) -> tuple[DocumentBatch, tuple[Tally, ...]]:
        """Return the documents of a chunk and the counts over it alone."""
        for tally in self._tallies:
            tally.clear()
        return self._tokenize_chunk(chunk), self._tallies

    def _tokenize_chunk(self, chunk: RecordChunk) -> DocumentBatch:
        self._encoder.begin_chunk()
        built = list(self.reader.build_examples(chunk.read_records()))
        examples = [example for _, example in built]
        if examples:
            documents = self._encoder.encode_examples(examples, [place for place, _ in built])
        else:
            empty = np.zeros(0, np.int64)
            documents = EncodedDocuments(empty.astype(np.int32), empty.astype(np.uint8), empty)
        labels = [e.label if isinstance(e, LabelledExample) else -1 for e in examples]
        return DocumentBatch(
            documents,
            chunk.file,
            np.array([place.number for place, _ in built], np.int64),
            np.array(labels, np.int64),
        )
