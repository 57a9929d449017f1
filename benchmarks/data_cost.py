"""CPU time and memory of tokenizing, packing, opening and resuming a data set of short records.

    python benchmarks/data_cost.py --tokenizer DIR --text FILE [--records 1000000] [--words 19]

Records of ``--words`` words are cut from ``--text`` (JSON Lines with ``text``) at random places.

*Stages*: reading alone, reading and parsing, and so on up to a whole build of the token cache, and
the library ``tokenizers`` on the same texts: in turn in one process, on the first ``--sample``
records; the median of the rounds, and the least, which other work on the machine disturbed least.

*Builds*: each in a fresh process: the first ``--alone`` records in that process alone, and all with
``--processes`` forked ones. CPU is that of all processes together; memory is private and of the
process that reads and writes, sampled every 3 ms, above that before.

*Resume*: fresh processes open the entry and load the batch of the first step, or of a late one.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import PeakMemory, print_table, run_processes, write_result
from transformers import AutoTokenizer

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.data.documents import load_sequence_set
from dist_peft.data.files import open_source, read_chunks, read_records
from dist_peft.data.loader import TokenLoader
from dist_peft.data.sources import read_examples
from dist_peft.data.tokens import load_token_documents

_KEY = "data.train[0]"
_TEXTS = 512
"""Texts in a call of the tokenizer, as in a build."""


def write_records(path: Path, text: Path, records: int, words: int) -> None:
    found = " ".join(json.loads(line)["text"] for line in text.open(encoding="utf-8")).split()
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(records):
            start = generator.randrange(len(found) - words)
            file.write(json.dumps({"text": " ".join(found[start : start + words])}) + "\n")


def measure_cpu() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass


def measure_stages(
    path: Path, tokenizer: str, sample: int, rounds: int
) -> dict[str, tuple[float, float]]:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    source = DataSource(path=str(path), limit=sample)
    opened = open_source(source, _KEY)
    texts = [record["text"] for _, record in read_records(opened, sample)]
    backend = loaded.backend_tokenizer

    def tokenize() -> None:
        for start in range(0, len(texts), _TEXTS):
            encodings = backend.encode_batch_fast(
                texts[start : start + _TEXTS], add_special_tokens=False
            )
            exhaust([encoding.ids for encoding in encodings])

    def build() -> None:
        with tempfile.TemporaryDirectory() as cache:
            config = DataConfig(train=[source], cache_dir=cache, workers=1)
            load_token_documents(config, source, loaded, _KEY)

    stages: dict[str, Callable[[], None]] = {
        "read": lambda: exhaust(read_chunks(opened, sample)),
        "read, parse": lambda: exhaust(read_records(opened, sample)),
        "read, parse, make examples": lambda: exhaust(read_examples(source, opened, _KEY)),
        "`tokenizers` alone": tokenize,
        "whole build": build,
    }
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, stage in stages.items():
            before = time.process_time()
            stage()
            found[name].append((time.process_time() - before) / sample * 1e6)
    return {name: (statistics.median(each), min(each)) for name, each in found.items()}


def load_records(
    path: Path, tokenizer: str, cache: Path, records: int, step: int
) -> dict[str, float]:
    """Open an entry that is there already, and load the batch of a step."""
    source = DataSource(path=str(path), limit=records)
    config = DataConfig(train=[source], seq_len=2048, cache_dir=str(cache))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    before = measure_cpu()
    with PeakMemory() as memory:
        rows = load_sequence_set(config, config.train, loaded, name="train")
        opened = measure_cpu()
        loader = TokenLoader(
            rows,
            global_batch=16,
            micro_batch=16,
            seed=0,
            shuffle=True,
            data_rank=0,
            data_size=1,
            seq_len=2048,
            pad_id=0,
        )
        loader.load_step(step)
    return {
        "seconds": opened - before,
        "step_seconds": measure_cpu() - opened,
        "peak": memory.anonymous - memory.before.anonymous,
        "rests": memory.after.anonymous - memory.before.anonymous,
        "tokens": rows.total_tokens,
        "sequences": len(rows),
    }


def build_entry(
    path: Path, tokenizer: str, cache: Path, processes: int, records: int
) -> dict[str, float]:
    """Tokenize without packing; the memory is that of reading, tokenizing and writing."""
    source = DataSource(path=str(path), limit=records)
    config = DataConfig(train=[source], cache_dir=str(cache), workers=processes)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    before = measure_cpu()
    with PeakMemory() as memory:
        load_token_documents(config, source, loaded, _KEY)
    return {
        "records": records,
        "seconds": measure_cpu() - before,
        "peak": memory.anonymous - memory.before.anonymous,
        "rests": memory.after.anonymous - memory.before.anonymous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=19)
    parser.add_argument("--alone", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sample", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--late-step", type=int, default=10**6)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    count = args.records
    directory = Path(tempfile.mkdtemp())
    try:
        path = directory / "records.jsonl"
        write_records(path, args.text, count, args.words)

        def run(function: Callable[..., Any], *job: Any) -> Any:
            return run_processes(function, [job], TOKENIZERS_PARALLELISM="false")[0]

        stages = run(measure_stages, path, args.tokenizer, min(args.sample, count), args.rounds)
        cache, many, few = directory / "cache", args.processes, min(args.alone, count)
        alone = directory / "alone"
        builds = {
            f"{few} in one process": run(build_entry, path, args.tokenizer, alone, 1, few),
            f"{count} with {many} processes": run(
                build_entry, path, args.tokenizer, cache, many, count
            ),
        }
        opens = {
            name: run(load_records, path, args.tokenizer, cache, count, step)
            for name, step in (("first step", 0), (f"step {args.late_step}", args.late_step))
        }
    finally:
        shutil.rmtree(directory)
    tokens = opens["first step"]["tokens"] / count
    print(f"{count} records, {tokens:.1f} tokens each\n")
    print_table(
        ("stage", "CPU us a record", "least"), [(n, *figures) for n, figures in stages.items()]
    )
    print()
    print_table(
        ("build", "CPU us a record", "private peak B a record"),
        [
            (name, each["seconds"] / each["records"] * 1e6, f"{each['peak'] / each['records']:.0f}")
            for name, each in builds.items()
        ],
    )
    print()
    print_table(
        ("from the cache, to", "open, CPU s", "step, CPU s", "peak B a record", "rests B a record"),
        [
            (
                name,
                f"{each['seconds']:.2f}",
                f"{each['step_seconds']:.3f}",
                f"{each['peak'] / count:.0f}",
                f"{each['rests'] / count:.0f}",
            )
            for name, each in opens.items()
        ],
    )
    result = {"records": count, "words": args.words, "tokens": tokens, "stages": stages}
    write_result("data_cost", {**result, "builds": builds, "opens": opens})


if __name__ == "__main__":
    main()
