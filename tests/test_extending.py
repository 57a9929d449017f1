"""The recipes of ``docs/extending.md`` are executed as they stand on the page."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.ia3.format import public_ia3
from dist_peft.core.config.run import BaseConfig, DataSource, EngineConfig, TrainConfig
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.data import sources
from dist_peft.data.examples import CompletionExample
from dist_peft.data.files import open_source
from dist_peft.data.sources import read_examples
from dist_peft.engine.single import SingleEngine
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.model_directory import write_model_directory
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.quant.codec import Codec
from dist_peft.store.reader import RowReader
from dist_peft.train import metrics
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.step_metrics import StepMetrics
from tests.support import tiny_engines
from tests.support.adapters import fill, frozen_model, gathered, ids, tiny_llama
from tests.support.tiny_runs import save_base

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"```python recipe=(\w+)\n(.*?)```", PAGE, re.DOTALL))
CPU = torch.device("cpu")


def run_recipe(name: str) -> Any:
    """A module made of the recipe's code."""
    module = types.ModuleType(f"recipe_{name}")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(RECIPES[name], f"docs/extending.md {name}", "exec"), module.__dict__)
    return module


def test_each_recipe_is_executed_here() -> None:
    own = Path(__file__).read_text()
    assert PAGE.count("```python") == len(RECIPES) == 6
    for name in RECIPES:
        assert f'run_recipe("{name}")' in own


def test_adapter_trains_a_step() -> None:
    recipe = run_recipe("adapter")
    original = tiny_llama()
    model = frozen_model(original)
    adapter = recipe.ShiftAdapter(recipe.ShiftConfig(target_modules=["q_proj", "down_proj"]))
    adapter.attach_to_model(model)
    fill(model, original, ranks=3)
    layers = [m for m in model.modules() if isinstance(m, recipe.ShiftLinear)]
    assert len(layers) == 4 and all(isinstance(layer, AdapterModule) for layer in layers)
    engine = SingleEngine(CPU)
    engine.shard_model(model, list(model.model.layers))
    call = engine.setup_optimizer(
        model, make_optimizer_factory(TrainConfig(), CPU), adapter.get_lr_scale
    )

    def loss() -> torch.Tensor:
        adapter.begin_micro_batch(0, torch.arange(2))
        logits = call(ids()).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())

    with torch.no_grad():
        expected = original(ids()).logits
        torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    before = loss()
    engine.backward(before, last=True)
    engine.step(lr=1e-2, max_norm=1.0)
    assert loss() < before
    public = adapter.to_public_adapter(gathered(model), "tiny/base")
    assert len(public.tensors) == 4 and all(bool(v.any()) for v in public.tensors.values())


def table_rows(section: str, column: int = 0) -> list[list[str]]:
    """Cells of the tables' rows in a section of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [re.split(r" (?<!\\)\| ", row) for row in rows]


def test_adapter_files_and_lines_of_the_page_are_in_the_tree() -> None:
    rows = table_rows("An adapter")
    assert len(rows) == 11
    for files, text in rows:
        for file in re.findall(r"`(.*?)`", files):
            path = ROOT / file if (ROOT / file).exists() else ROOT / "dist_peft" / file
            assert path.exists(), file
            for line in re.findall(r"`(.*?)`", text) if path.parent.name != "ia3" else []:
                if "ia3" in line.lower():
                    found = re.sub(r"\s+", " ", path.read_text())
                    assert line.replace("\\|", "|") in found, (file, line)


def test_metric_sink_gets_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = run_recipe("metric_sink").CsvSink
    monkeypatch.setattr(metrics, "METRIC_SINKS", (*metrics.METRIC_SINKS, sink))
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write_step(
            StepMetrics(
                step=1,
                loss=2.5,
                lr=1e-3,
                grad_norm=1.0,
                tokens=8,
                tokens_per_s=1.0,
                mem_peak=0,
                bytes_gathered=0,
            )
        )
    assert (tmp_path / "loss.csv").read_text() == "1,2.5\n"
    assert (tmp_path / "metrics.jsonl").is_file()


def test_codec_encodes_and_decodes() -> None:
    codec = run_recipe("codec").Float8Codec()
    assert codec == type(codec)() and hash(codec) == hash(type(codec)())
    weight = torch.randn(5, 13)
    packed = codec.quantize_to_packed(weight)
    assert packed.shape == (5, 20) and codec.num_row_bytes(13) % 4 == 0
    assert torch.equal(codec.quantize_to_packed(weight[1:3]), packed[1:3])
    members = [name for name in vars(Codec) if not name.startswith("_")]
    assert len(members) > 5 and all(hasattr(codec, name) for name in members)
    scales = codec.read_statistics(packed, 13)
    torch.testing.assert_close(scales[:, 0] * 448, weight.abs().amax(1))
    decoded = codec.dequantize_rows(packed, 13, torch.float32)
    assert (decoded - weight).abs().max() <= weight.abs().max() / 16
    assert torch.equal(codec.dequantize_rows(packed[2:], 13, torch.float32), decoded[2:])
    original = tiny_llama()
    with torch.no_grad():
        found, expected = (m(ids()).logits for m in (frozen_model(original, codec), original))
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


def test_data_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = run_recipe("data_format").QUESTION
    monkeypatch.setattr(sources, "_FORMATS", (*sources._FORMATS, question))
    records = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": "3"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = DataSource(path=str(file))
    examples = read_examples(source, open_source(source, "data.train[0]"), "data.train[0]")
    assert [example for _, example in examples] == [
        CompletionExample("Q: 1 + 1?\nA: ", "2"),
        CompletionExample("Q: 1 + 2?\nA: ", "3"),
    ]


def test_export_format_is_written(tmp_path: Path) -> None:
    packer = run_recipe("export_format").Int8Rows()
    base = save_base(tmp_path / "base")
    path, vector = "model.layers.0.self_attn.v_proj", torch.linspace(-1, 2, 32)
    write_adapter_directory(
        tmp_path / "adapter", public_ia3({path: vector}, [], [path], str(base)), {}
    )
    config = BaseConfig(path=str(base), quant=None, compute_dtype="float32")
    with open_merged_weights(config, base, tmp_path / "adapter", "original") as walk:
        written = write_model_directory(walk, packer, tmp_path / "out", torch.float32)
        with RowReader(walk.skeleton.index) as reader:
            rows = reader.read_rows(f"{path}.weight", Span(0, 32)).float()
    assert written.packed == 14 and written.merged == 1
    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    found = tensors[f"{path}.weight"].float() * tensors[f"{path}.scale"]
    expected = rows * vector[:, None]
    assert tensors[f"{path}.weight"].dtype == torch.int8
    step = expected.abs().amax(1, keepdim=True) / 127
    assert bool(((found - expected).abs() <= step * 0.51).all())


def test_engine_trains_as_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = run_recipe("engine")
    single = EngineConfig(kind="single")
    expected = tiny_engines.train(World(), single, micro=6)
    engine = recipe.CountingEngine(CPU)
    monkeypatch.setattr(tiny_engines, "make_engine", lambda *arguments: engine)
    tiny_engines.assert_same(tiny_engines.train(World(), single, micro=6), expected)
    assert engine.passes == 6
