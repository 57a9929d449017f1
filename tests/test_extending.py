"""The recipes of ``docs/extending.md`` are executed as they stand on the page."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_peft.app import cli
from dist_peft.core.config.run import DataSource, EngineConfig, TrainConfig
from dist_peft.core.log import close_log
from dist_peft.core.world import World
from dist_peft.data import record_formats
from dist_peft.data.examples import CompletionExample
from dist_peft.data.files import open_source
from dist_peft.data.sources import read_examples
from dist_peft.engine.single import SingleEngine
from dist_peft.export.formats.registry import FORMATS
from dist_peft.model.adapter_module import AdapterModule
from dist_peft.quant.codec import Codec
from dist_peft.train import metrics
from dist_peft.train.optimizers import make_optimizer_factory
from dist_peft.train.step_metrics import StepMetrics, read_metrics
from tests.support import tiny_engines
from tests.support.adapters import fill, frozen_model, gathered, ids, tiny_llama
from tests.support.scratch_package import run_commands_in_package
from tests.support.tiny_runs import save_config, tiny_tree

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"```python recipe=(\w+)\n(.*?)```", PAGE, re.DOTALL))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _recipes_are_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files, from which ``inspect`` can read the source of functions."""
    directory = tmp_path_factory.mktemp("recipes")
    for name, code in RECIPES.items():
        (directory / f"recipe_{name}.py").write_text(code)
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))
    for name in RECIPES:
        sys.modules.pop(f"recipe_{name}", None)
    close_log()


def run_recipe(name: str) -> Any:
    """A module made of the recipe's code."""
    return importlib.import_module(f"recipe_{name}")


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
    for rows, columns in ((0, 5), (1, 1), (3, 7), (2, 64)):
        odd = torch.randn(rows, columns)
        restored = codec.dequantize_rows(codec.quantize_to_packed(odd), columns, torch.float32)
        torch.testing.assert_close(restored, odd, rtol=1 / 16, atol=0.02)
    decoded = codec.dequantize_rows(packed, 13, torch.float32)
    assert (decoded - weight).abs().max() <= weight.abs().max() / 16
    assert torch.equal(codec.dequantize_rows(packed[2:], 13, torch.float32), decoded[2:])
    original = tiny_llama()
    with torch.no_grad():
        found, expected = (m(ids()).logits for m in (frozen_model(original, codec), original))
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


def test_data_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = run_recipe("data_format").QUESTION
    monkeypatch.setattr(
        record_formats, "RECORD_FORMATS", (*record_formats.RECORD_FORMATS, question)
    )
    records = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": "3"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = DataSource(path=str(file))
    examples = read_examples(source, open_source(source, "data.train[0]"), "data.train[0]")
    assert [example for _, example in examples] == [
        CompletionExample("Q: 1 + 1?\nA: ", "2"),
        CompletionExample("Q: 1 + 2?\nA: ", "3"),
    ]


@pytest.mark.e2e
def test_export_format_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Option, table, outlook, writer, verification and report come with the class."""
    format = run_recipe("export_format").Int8RowsExport()
    assert table_rows("An export format") == [
        ["`export/formats/registry.py`", "`Int8RowsExport(),` in `FORMATS`"]
    ]
    monkeypatch.setitem(FORMATS, format.name, format)  # the line
    tree = tiny_tree(tmp_path, base__quant={"kind": "int", "bits": 4, "group_size": 8})
    assert cli.main(["train", "--config", str(save_config(tmp_path, tree))]) == 0
    assert "int8-rows" in capsys.readouterr().err.partition("exports of this run: ")[2]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "--list"])
    assert "| `int8-rows`          | merged, a scale for each row" in capsys.readouterr().out
    argv = ["export", "--run", str(tmp_path / "run"), "--base", "decoded", "--out"]
    assert cli.main([*argv, str(tmp_path / "no"), "--format", "mlx", "--no-verify"]) == 2
    argv += [str(tmp_path / "out"), "--format", "int8-rows"]
    assert cli.main([*argv, "--levels", "100", "--bits", "4"]) == 0
    err = capsys.readouterr().err
    assert "--bits has no effect on format int8-rows" in err
    assert "merged, 100 levels: 14 weights packed" in err and "loaded by int8-rows 1.0" in err
    assert "Export int8-rows" in (tmp_path / "run" / "report.html").read_text()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    codes = tensors["model.layers.0.self_attn.v_proj.weight"]
    assert codes.dtype == torch.int8 and codes.abs().max() == 100


def change_lines(root: Path, file: str, line: str, new: str) -> int:
    """Replace one line of a scratch copy by others; return the number of lines that differ."""
    path = root / file
    text = path.read_text()
    assert text.count(line) == 1, (file, line)
    path.write_text(text.replace(line, new))
    return len(new.splitlines()) - (line in new)


@pytest.mark.e2e
def test_codec_trains_merges_and_reads_its_own_packed_base(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dist_peft", root / "dist_peft", ignore=ignored)
    (root / "dist_peft" / "quant" / "float8.py").write_text(RECIPES["codec"])
    package = root / "dist_peft"
    nf4 = "from dist_peft.quant.nf4 import Nf4Codec"
    row, kinds = (
        '    "int": AffineCodec,',
        'kind: Literal["nf4", "int", "mxfp4", "fp8", "nvfp4", "fp4", "llm_int8"]',
    )
    own, entry, literal = (re.findall("`(.*?)`", text)[0] for _, text in table_rows("A codec"))
    changed = change_lines(package, "quant/codec.py", nf4, f"{own}\n{nf4}")
    changed += change_lines(package, "quant/codec.py", row, f"{row}\n    {entry}")
    changed += change_lines(package, "core/config/quantization.py", kinds, literal)
    assert changed <= 5
    tree = tiny_tree(tmp_path, base__quant={"kind": "float8"})
    first = save_config(tmp_path, tree)
    packed = {"base": {"path": str(tmp_path / "packed"), "compute_dtype": "float32"}}
    again = {**tree, **packed, "save": {"dir": str(tmp_path / "again"), "every": 1}}
    (tmp_path / "second").mkdir()
    second = save_config(tmp_path / "second", again)
    merge = ["merge", "--base", "decoded", "--dtype", "float32", "--max-error", "0.001"]
    run_commands_in_package(
        root,
        ["train", "--config", str(first)],
        [*merge, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "merged")],
        ["quantize", "--config", str(first), "--out", str(tmp_path / "packed")],
        ["train", "--config", str(second)],
    )
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["kind"] == "float8" and "bits" not in settings
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(name.endswith(".packed") for name in stored) == 14
    one, two = (
        [record.loss for record in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("run", "again")
    )
    assert len(one) == 3 and one == two
    assert "float8, one scale a row" in (tmp_path / "run" / "report.html").read_text()
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(merged[name], base[name])


def test_engine_trains_as_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = run_recipe("engine")
    single = EngineConfig(kind="single")
    expected = tiny_engines.train(World(), single, micro=6)
    engine = recipe.CountingEngine(CPU)
    monkeypatch.setattr(tiny_engines, "make_engine", lambda *arguments: engine)
    tiny_engines.assert_same(tiny_engines.train(World(), single, micro=6), expected)
    assert engine.passes == 6
