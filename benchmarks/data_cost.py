"""CPU time and memory of tokenizing, packing and opening a data set of short records.

    python benchmarks/data_cost.py [--records 300000] [--words 22] [--tokenizer DIR] [--text FILE]

Records of ``--words`` words are cut from ``--text`` (JSON Lines with ``text``) at random places.
Each measurement is a fresh process with one thread: ``tokenize`` starts without a cache,
``cached`` opens the entry that it left. Private memory above the process before is sampled every
3 ms; ``index`` is the peak of Python and numpy alone, without the tokenizer's own memory
(tracemalloc, in a process of its own).
"""

import argparse
import json
import random
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from common import PeakMemory, print_table, run_processes, write_result
from transformers import AutoTokenizer

from dist_peft.core.config.run import DataConfig
from dist_peft.data.documents import load_sequence_set


def write_records(path: Path, text: Path, records: int, words: int) -> None:
    found = " ".join(json.loads(line)["text"] for line in text.open(encoding="utf-8")).split()
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(records):
            start = generator.randrange(len(found) - words)
            file.write(json.dumps({"text": " ".join(found[start : start + words])}) + "\n")


def load_records(path: Path, tokenizer: str, cache: Path, trace: bool) -> dict[str, float]:
    config = DataConfig(train=[{"path": str(path)}], seq_len=2048, cache_dir=str(cache))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if trace:
        tracemalloc.start()
    before = time.process_time()
    with PeakMemory() as memory:
        rows = load_sequence_set(config, config.train, loaded, name="train")
    seconds = time.process_time() - before
    private = memory.anonymous - memory.before.anonymous
    return {
        "seconds": seconds,
        "peak": tracemalloc.get_traced_memory()[1] if trace else private,
        "rests": memory.after.anonymous - memory.before.anonymous,
        "tokens": rows.total_tokens,
        "sequences": len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--words", type=int, default=22)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp())
    try:
        path = directory / "records.jsonl"
        write_records(path, args.text, args.records, args.words)
        found: dict[str, Any] = {}
        for name, trace, cache in (
            ("tokenize", False, "cache"),
            ("cached", False, "cache"),
            ("tokenize, index", True, "traced"),
            ("cached, index", True, "traced"),
        ):
            job = (path, args.tokenizer, directory / cache, trace)
            (found[name],) = run_processes(load_records, [job], TOKENIZERS_PARALLELISM="false")
    finally:
        shutil.rmtree(directory)
    count = args.records
    print(f"{count} records, {found['cached']['tokens'] / count:.1f} tokens each\n")
    print_table(
        ("", "CPU us a record", "peak B a record", "rests B a record"),
        [
            (
                name,
                "" if "index" in name else f"{each['seconds'] / count * 1e6:.1f}",
                f"{each['peak'] / count:.0f}",
                "" if "index" in name else f"{each['rests'] / count:.0f}",
            )
            for name, each in found.items()
        ],
    )
    write_result("data_cost", {"records": count, "words": args.words, "measured": found})


if __name__ == "__main__":
    main()
