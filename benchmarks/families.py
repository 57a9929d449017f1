"""Every causal language model type of the installed transformers: works, refused, or crashes.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--only TYPE ...] [--jobs 2] [--limit 90]
        [--formats FORMAT ...]

For each type a tiny random model is made from its default configuration with small sizes, with its
towers where it is published with some. In float32 on the CPU, with a time limit:

    logits    the model as built and loaded here without quantization, against transformers' own
    gradient  NF4 and LoRA on all linears, one backward: which factors get a gradient
    packing   whether documents of a row are isolated (else the run refuses data.packing)
    refused   the message, if one of the above is refused
    formats   the reason of each export format that refuses the type (``family_runs``)
    ranks     three steps of ``dist-peft train`` on one rank and on two: difference of the losses
    merge     ``dist-peft merge``, loaded by transformers: error over the change by training
    gguf      the same of an export in F16, loaded by llama.cpp; other formats for ``EXPORTED``

Where transformers does not build a type or does not predict from text alone, the refusal here is
the row; without one the type is not tried. A type whose files are refused as published, with the
advice to write them converted, is tried so. A few towers want timm and scipy. The classes
that declare tensors to be kept in float32 are read from transformers' source, all of them, with the
tried types that they belong to. Results: ``families.json`` and ``families.md``.
"""

import argparse
import ast
import json
import multiprocessing as mp
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, machine, write_result
from family_models import reference_model, save_converted, save_without_weights
from family_runs import FORMATS, find_format_obstacles, try_runs
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from dist_peft.adapters.lora.method import LoraAdapter
from dist_peft.core.config.run import BaseConfig, LoraConfig, QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.engine.single import SingleEngine
from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.model.load import load_model
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.reader import RowReader

CPU = torch.device("cpu")
TOKENS = 24
EXPORTED = """
llama llama4 mistral3 qwen2 qwen3 qwen3_moe qwen3_vl qwen3_vl_moe gemma3_text gemma3 gemma4 phi3
mixtral deepseek_v3 gpt_oss glm4_moe granitemoe nemotron_h bamba olmo_hybrid kimi_linear
"""
"""Types of which every format is written and loaded."""


def list_types() -> list[str]:
    """Every causal and conditional type of the installed transformers."""
    tables = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return sorted({kind for table in tables for kind in table})


def build_loaded(directory: Path, quant: QuantConfig | None, lora: bool) -> nn.Module:
    base = BaseConfig(path=str(directory), quant=quant, compute_dtype="float32")
    skeleton = build_skeleton(base, directory)
    if lora:
        LoraAdapter(LoraConfig(), seed=0, arithmetic=torch.float32).attach_to_model(skeleton.model)
    engine = SingleEngine(CPU)
    engine.shard_model(skeleton.model, skeleton.blocks)
    with RowReader(skeleton.index) as reader:
        load_model(skeleton.model, reader, engine, CPU)
    return skeleton.model


def _find_format_obstacles(directory: Path) -> dict[str, str]:
    base = BaseConfig(path=str(directory), quant=QuantConfig(), compute_dtype="float32")
    found = find_format_obstacles(build_skeleton(base, directory), directory, base)
    return {name: reason.replace(str(directory), "BASE") for name, reason in found.items()}


def factors_without_gradient(model: nn.Module, ids: Tensor) -> tuple[int, list[str]]:
    """Number of LoRA factors, and those without a gradient where all factors are random."""
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.1)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    lacking = [n for n, p in factors.items() if p.grad is None or not p.grad.any()]
    return len(factors), lacking


def try_type(kind: str, directory: Path) -> dict[str, Any]:
    """What the table has of one type."""
    found: dict[str, Any] = {"type": kind}
    ids = 3 + torch.arange(TOKENS)[None] * 7 % 89
    expected, reason = None, ""
    try:
        model = reference_model(kind, directory)
        found["class"] = type(model).__name__
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        reason = _text(error)
        if "class" not in found:
            save_without_weights(kind, directory)
    row = compare(directory, ids, expected)
    if expected is not None and "save_original_format=False" in row.get("message", ""):
        save_converted(model, directory)
        converted = compare(directory, ids, expected)
        if converted["outcome"] != "refused":
            row = {"as_published": row["message"], **converted}
    if row["outcome"] == "not tried":
        row["message"] = reason
    return {**found, **row}


def compare(directory: Path, ids: Tensor, expected: Tensor | None) -> dict[str, Any]:
    """The outcome of loading ``directory``, whose logits of ``ids`` are ``expected``; None: which
    transformers does not compute."""
    found: dict[str, Any] = {}
    try:
        ours = build_loaded(directory, None, False)
        if expected is None:
            return {"outcome": "not tried"}
        with torch.no_grad():
            logits = ours(input_ids=ids, use_cache=False).logits
        found["logits_difference"] = float((logits - expected).abs().max())
        found["packing"] = "isolated" if documents_are_isolated(ours, CPU) else "refused"
        found["formats"] = _find_format_obstacles(directory)
        trained = build_loaded(directory, QuantConfig(), True)
        found["factors"], found["without_gradient"] = factors_without_gradient(trained, ids)
        found["outcome"] = "works" if found["logits_difference"] < 1e-4 else "wrong"
    except UserError as error:
        message = str(error).replace(str(directory), "BASE")
        return {**found, "outcome": "refused", "message": message}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return {**found, "outcome": "crashes", "message": f"{_text(error)} [{where}]"}
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _in_process(kind: str, out: Path) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    out.write_text(json.dumps(try_type(kind, out.parent / "base")))


def with_limit(kind: str, limit: float) -> dict[str, Any]:
    """``try_type`` in a forked process, which shares the imports."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found.json"
        begin = time.monotonic()
        process = mp.get_context("fork").Process(target=_in_process, args=(kind, out))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            found = {"type": kind, "outcome": "not tried", "message": f"over {limit:.0f} s"}
        elif not out.exists():
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            found = {"type": kind, "outcome": "crashes", "message": name}
        else:
            found = json.loads(out.read_text())
        print(f"{time.monotonic() - begin:5.1f} s {kind}: {found['outcome']}", flush=True)
        return found


def with_runs(found: dict[str, Any], formats: Sequence[str]) -> dict[str, Any]:
    """The row of a type that works, with the whole runs of it, exported in these formats."""
    kind = found["type"]
    names = formats if kind in EXPORTED.split() else ["gguf"]
    wanted = {name: FORMATS[name] for name in names}
    wanted = {n: words for n, words in wanted.items() if n not in found["formats"]}
    with tempfile.TemporaryDirectory() as directory:
        begin = time.monotonic()
        model = reference_model(kind, Path(directory) / "base")
        if "as_published" in found:
            save_converted(model, Path(directory) / "base")
        runs = try_runs(Path(directory) / "base", Path(directory) / "runs", wanted)
        print(f"{time.monotonic() - begin:5.1f} s runs of {kind}: {runs}", flush=True)
    return {**found, "runs": runs}


def float32_classes() -> list[dict[str, Any]]:
    """Classes of transformers that keep tensors in float32: name, directory, patterns."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "_keep_in_fp32_modules" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found += [
                    {"class": node.name, "directory": path.parent.name, "key": key, "names": names}
                    for key, names in _kept_names(node)
                ]
    return found


def _kept_names(node: ast.ClassDef) -> list[tuple[str, str]]:
    kept = []
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        for target in targets:
            key = target.id if isinstance(target, ast.Name) else ""
            if key.startswith("_keep_in_fp32_modules") and statement.value is not None:  # type: ignore[attr-defined]
                kept.append((key, ast.unparse(statement.value)))  # type: ignore[attr-defined]
    return [(key, names) for key, names in kept if names != "None"]


def directory_of(kind: str) -> str:
    """The package of transformers that has a type's model."""
    return CONFIG_MAPPING[kind].__module__.split(".")[-2]


def as_markdown(types: list[dict[str, Any]], kept: list[dict[str, Any]]) -> str:
    """The tables, with the machine above them."""
    host = machine()
    counts = {o: sum(t["outcome"] == o for t in types) for o in OUTCOMES}
    lines = [
        "# Causal language model types",
        "",
        ", ".join(f"{key} {value}" for key, value in host.items()),
        "",
        ", ".join(f"{outcome}: {count}" for outcome, count in counts.items()),
        "",
        "| type | outcome | logits off | packing | LoRA factors | without gradient | 2 ranks | "
        "merge | exports | message |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for t in sorted(types, key=lambda t: (OUTCOMES.index(t["outcome"]), t["type"])):
        without = ", ".join(t.get("without_gradient", ()))
        difference = t.get("logits_difference")
        cells = [
            t["type"],
            t["outcome"],
            "" if difference is None else f"{difference:.1e}",
            t.get("packing", ""),
            str(t.get("factors", "")),
            without if len(without) < 200 else f"{without[:200]} ...",
            format_error(t.get("runs", {}).get("ranks")),
            format_error(t.get("runs", {}).get("merge")),
            ", ".join(
                f"{name}: {format_error(error)}"
                for name, error in t.get("runs", {}).items()
                if name in FORMATS
            ),
            t.get("message", "").replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    outcomes: dict[str, list[str]] = {}
    for t in types:
        outcomes.setdefault(directory_of(t["type"]), []).append(f"{t['type']}: {t['outcome']}")
    lines += ["", "# Classes that keep tensors in float32", ""]
    lines += ["| class | key | names | types tried |", "|---|---|---|---|"]
    for k in kept:
        tried = ", ".join(outcomes.get(k["directory"], [])) or "no causal LM type"
        lines.append(f"| {k['class']} | `{k['key']}` | `{k['names']}` | {tried} |")
    return "\n".join(lines) + "\n"


def format_error(error: float | str | None) -> str:
    """A figure of ``family_runs.try_runs``, or its message."""
    if error is None:
        return ""
    return error.replace("|", "\\|") if isinstance(error, str) else f"{error:.1e}"


OUTCOMES = ("works", "refused", "crashes", "wrong", "not tried")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list_types())
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=90, help="seconds a type")
    parser.add_argument("--resume", action="store_true", help="of a run that was ended")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--no-runs", dest="runs", action="store_false", help="no whole runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:  # what is imported now is not imported again
        print("llama:", try_type("llama", Path(directory))["outcome"], flush=True)
    begun = args.out / "families.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    lines = begun.read_text().splitlines() if args.resume and begun.exists() else []
    rows = {row["type"]: row for row in map(json.loads, lines) if row["type"] in args.only}
    left = [kind for kind in args.only if kind not in rows]
    first = {kind: number for number, kind in enumerate(EXPORTED.split())}
    with ThreadPoolExecutor(args.jobs) as pool, begun.open("a" if lines else "w") as file:

        def keep(found: dict[str, Any]) -> None:
            rows[found["type"]] = found
            print(json.dumps(found), file=file, flush=True)

        for found in pool.map(lambda kind: with_limit(kind, args.limit), left):
            keep(found)
        runs = [row for row in rows.values() if row["outcome"] == "works" and "runs" not in row]
        runs.sort(key=lambda row: (first.get(row["type"], len(first)), row["type"]))
        run_type = partial(with_runs, formats=args.formats)
        for found in pool.map(run_type, runs if args.runs else []):
            keep(found)
    begun.unlink()
    types = list(rows.values())
    if (before := args.out / "families.json").is_file():  # of other types
        done = {t["type"] for t in types}
        earlier = json.loads(before.read_text())["result"]["types"]
        runs = {t["type"]: t["runs"] for t in earlier if "runs" in t}
        for t in types if not args.runs else ():  # those of an earlier time stay
            t |= {"runs": t.get("runs") or runs[t["type"]]} if t["type"] in runs else {}
        for t in types if args.runs else ():  # so do formats that were not asked for
            others = {n: v for n, v in runs.get(t["type"], {}).items() if n not in args.formats}
            t |= {"runs": {**others, **t["runs"]}} if "runs" in t else {}
        types += [t for t in earlier if t["type"] not in done and t["type"] in list_types()]
    types.sort(key=lambda t: t["type"])
    kept = float32_classes()
    write_result("families", {"types": types, "kept_in_float32": kept}, args.out)
    (args.out / "families.md").write_text(as_markdown(types, kept))
    for outcome in OUTCOMES:
        print(outcome, sum(t["outcome"] == outcome for t in types))


if __name__ == "__main__":
    main()
