"""Every format written from a run and loaded by its own library."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.export import verify_formats
from dist_peft.export.formats.registry import (
    FORMATS,
    describe_verification,
    export_model,
    list_format_facts,
    render_format_table,
)
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Comparison
from dist_peft.store.reader import RowReader
from dist_peft.store.writer import StreamWriter
from tests.support.export_runs import FakeRun, fork_consumers, make_run


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and lines are those of transformers; llama.cpp rounds activations to 8 bits."""
    monkeypatch.delenv("DIST_PEFT_XLLAMACPP_PYTHON", raising=False)


ROOT = Path(__file__).parents[3]
ADAPTERS = {"peft", "peft-expanded", "peft-experts", "gguf-lora", "mlx-adapter"}
QUANTIZED = sorted(FORMATS.keys() - ADAPTERS - {"hf-bf16", "awq"})  # awq: trained codes
INT4 = QuantConfig(kind="int", bits=4, group_size=32)
MLX = pytest.param("mlx", marks=pytest.mark.e2e)
"""Is loaded in a process of its own."""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("lora"), INT4)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("nf4"), QuantConfig())


@pytest.fixture(scope="module")
def qalora(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("qalora"), INT4, group=32)


@pytest.fixture(autouse=True)
def _transformers_loads_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp, which rounds activations too, has tests in ``test_verify_consumer``."""
    monkeypatch.delenv("DIST_PEFT_LLAMACPP_PYTHON", raising=False)


def loaded(run: FakeRun, name: str, out: Path, **settings: Any) -> Comparison:
    """Export, and what the consumer makes of it; skips where it is not installed."""
    exported = export_model(name, run.job(out, **settings))
    try:
        return run.verify(name, exported, **settings)[1]
    except VerificationSkipped as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "limit"),
    [pytest.param("mlx", 1e-5, marks=pytest.mark.e2e), ("hf-metal", 1e-5), ("gguf", 0.02)],
)
def test_qalora_is_exact_where_biases_are_floats(
    name: str, limit: float, qalora: FakeRun, tmp_path: Path
) -> None:
    assert loaded(qalora, name, tmp_path / "out", pooled=True).relative < limit


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [MLX, "hf-metal"])
def test_qalora_of_all_widths(bits: int, name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, QuantConfig(kind="int", bits=bits, group_size=32), group=32)
    assert loaded(run, name, tmp_path / "out", pooled=True).relative < 1e-5


@pytest.mark.parametrize("name", [MLX, "hf-metal", "gguf", "compressed-tensors"])
def test_qalora_on_a_bf16_run(name: str, tmp_path: Path) -> None:
    """Embeddings are bf16, scales and biases are not: loaders must take both."""
    run = make_run(tmp_path, INT4, group=32, dtype="bfloat16")
    assert loaded(run, name, tmp_path / "out", pooled=True).relative < 0.5  # bf16 arithmetic


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_integer_base_and_adapter_side_by_side(name: str, qalora: FakeRun, tmp_path: Path) -> None:
    found = loaded(qalora, name, tmp_path / "out", pooled=True)
    assert found.relative < (1e-5 if name == "compressed-tensors" else 2e-3)  # gptq has fp16 scales


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_merge_into_integer_zeros_is_refused_and_loses_the_adapter(
    name: str, qalora: FakeRun, tmp_path: Path
) -> None:
    message = r"integer zeros: .* loses \d+\.\d% of this run's adapter \(measured\).*add --lossy"
    with pytest.raises(UserError, match=message):
        export_model(name, qalora.job(tmp_path / "out", pooled=True, merge=True))
    with pytest.raises(UserError, match=r"integer zeros: merged weights are re-quantized.*--lossy"):
        export_model(name, qalora.job(tmp_path / "out", merge=True))
    assert not (tmp_path / "out").exists()
    settings = {"pooled": True, "merge": True, "lossy": True}
    found = loaded(qalora, name, tmp_path / "out", **settings)
    assert 0.2 < found.relative < 1.5


@pytest.mark.parametrize(
    ("name", "settings", "limit"),
    [
        pytest.param("bnb-nf4", {}, 0.9, marks=pytest.mark.e2e),
        pytest.param("mlx", {"bits": 8, "into": "decoded"}, 0.05, marks=pytest.mark.e2e),
        ("hf-metal", {"bits": 8, "into": "decoded"}, 0.05),
        ("gguf", {"into": "decoded"}, 0.05),
        ("gguf", {"type": "f16", "into": "decoded"}, 0.02),
        ("gguf", {"type": "q4_1"}, 0.9),
    ],
    ids=str,
)
def test_lora_merged_and_quantized_anew(
    name: str,
    settings: dict[str, Any],
    limit: float,
    lora: FakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_consumers(monkeypatch)
    assert 0 < loaded(lora, name, tmp_path / "out", **settings).relative < limit


@pytest.mark.parametrize(
    "name", [pytest.param("bnb-nf4", marks=pytest.mark.e2e), MLX, "hf-metal", "gguf"]
)
def test_nf4_base(name: str, nf4: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_consumers(monkeypatch)
    found = loaded(nf4, name, tmp_path / "out")
    assert 0 < found.relative < 1.5  # 4 bits for weights and changes of like size
    if name != "gguf":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config.get("quantization_config", config.get("quantization"))
        assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_nf4_base_has_no_integer_codes(name: str, nf4: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this run has none"):
        export_model(name, nf4.job(tmp_path / "out"))
    exported = export_model(name, nf4.job(tmp_path / "out", merge=True, lossy=True, group_size=32))
    assert exported.written.packed == 14 and not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("name", QUANTIZED)
def test_chunks_do_not_change_a_byte(name: str, lora: FakeRun, tmp_path: Path) -> None:
    one = export_model(name, lora.job(tmp_path / "one")).path
    many = export_model(name, lora.job(tmp_path / "many", chunk_bytes=1024)).path
    file = one if one.is_file() else one / "model.safetensors"
    other = many if many.is_file() else many / "model.safetensors"
    assert file.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", QUANTIZED)
def test_only_a_chunk_is_in_memory(
    name: str, lora: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read and written at a time; gptq puts one linear's packed tensors together."""
    sizes: dict[str, int] = {"read": 0, "write": 0}

    def reading(self: RowReader, name: str, span: Span | None = None) -> Tensor:
        rows = read(self, name, span)
        sizes["read"] = max(sizes["read"], rows.nbytes)
        return rows

    def writing(self: StreamWriter, name: str, rows: Tensor, start: int = 0) -> None:
        sizes["write"] = max(sizes["write"], rows.nbytes)
        write(self, name, rows, start)

    read, write = RowReader.read_rows, StreamWriter.write_rows
    monkeypatch.setattr(RowReader, "read_rows", reading)
    monkeypatch.setattr(StreamWriter, "write_rows", writing)
    chunk = 4 * 96 * 32  # 32 rows of the widest linear; bnb-nf4 takes 128
    export_model(name, lora.job(tmp_path / "out", chunk_bytes=chunk))
    assert sizes["read"] <= (4 * chunk if name == "bnb-nf4" else chunk)
    assert sizes["write"] <= chunk


@pytest.mark.parametrize("name", [MLX, "hf-metal", "compressed-tensors", "gptq", "gguf"])
def test_linears_that_groups_do_not_divide_stay_dense(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, INT4, intermediate_size=104)
    job = run.job(tmp_path / "out")
    exported = export_model(name, job)
    dense = {"mlp.down_proj"} | ({"mlp.gate_proj", "mlp.up_proj"} if name == "gptq" else set())
    wanted = {f"model.layers.{i}.{own}" for i in range(2) for own in dense}
    assert set(exported.written.unpacked) == wanted
    try:
        found = run.verify(name, exported)[1]
    except VerificationSkipped as error:
        pytest.skip(str(error))
    assert found.relative < 0.9


def test_settings_that_contradict_the_run(qalora: FakeRun, lora: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 bits in groups of 32; leave out --bits"):
        export_model("mlx", qalora.job(tmp_path / "out", pooled=True, bits=2))
    with pytest.raises(UserError, match="kept unchanged, 4 bits in groups of 32"):
        export_model("gptq", lora.job(tmp_path / "out", bits=8))
    with pytest.raises(UserError, match="--group-size 12 is not a multiple of 8"):
        export_model("hf-metal", lora.job(tmp_path / "out", group_size=12))
    with pytest.raises(UserError, match="groups of 32, 64 and 128, not of 16"):
        export_model("mlx", lora.job(tmp_path / "out", group_size=16))
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken(lora: FakeRun, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").touch()
    with pytest.raises(UserError, match=r"file\.gguf exists"):
        export_model("gguf", lora.job(tmp_path / "file.gguf"))
    for name in ("mlx", "gguf"):
        with pytest.raises(UserError, match="not empty"):
            export_model(name, lora.job(tmp_path))


def test_libraries_that_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(module: str) -> bool | None:
        return None if module in missing else True

    missing = {"xllamacpp", "llama_cpp", "mlx_lm", "peft"}
    monkeypatch.setattr(verify_formats, "find_spec", find)
    monkeypatch.setenv("DIST_PEFT_MLX_PYTHON", "/opt/mlx/bin/python")
    monkeypatch.delenv("DIST_PEFT_LLAMACPP_PYTHON", raising=False)
    texts = {name: describe_verification(known) for name, known in FORMATS.items()}
    gguf = "llama-cpp (not installed), else transformers + gguf (installed)"
    assert (
        texts["gguf"]
        == f"{gguf}; not models that transformers does not read; xllamacpp compares these"
    )
    assert texts["mlx"] == texts["mlx-adapter"] == "mlx-lm (installed)"  # in another Python
    assert texts["hf-bf16"] == "transformers (installed); or --verify blocks"
    assert texts["peft-expanded"] == "transformers + peft (peft not installed)"
    assert texts["peft"].endswith("(peft not installed); not QA-LoRA, see peft-expanded")
    facts = {each["format"]: each for each in list_format_facts()}
    assert facts.keys() == FORMATS.keys()
    assert facts["gguf"]["compared_by"][0] == {
        "libraries": ["llama_cpp"],
        "missing": ["llama_cpp"],
        "python_variable": "DIST_PEFT_LLAMACPP_PYTHON",
    }
    assert [each["missing"] for each in facts["peft"]["compared_by"]] == [["peft"]]
    missing = {"gguf"}
    gguf_lora = describe_verification(FORMATS["gguf-lora"])
    assert gguf_lora == "transformers + gguf (gguf not installed)"


def test_table_is_in_the_documentation() -> None:
    assert render_format_table() in (ROOT / "docs" / "export.md").read_text()


def test_measured_errors_in_the_documentation_are_the_results(tmp_path: Path) -> None:
    spec = spec_from_file_location("export_tables", ROOT / "benchmarks" / "export_tables.py")
    assert spec is not None and spec.loader is not None
    tables = module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (ROOT / "docs" / "export.md").read_text()
    assert tables.fill_tables(page) == page
    (damaged := tmp_path / "export.md").write_text(page.replace("| 143.9 |", "| 14.39 |"))
    assert tables.fill_tables(damaged.read_text()) == page != damaged.read_text()
    forms = {row["form"].split()[0] for row in tables.read_measured("export_formats")}
    assert forms <= FORMATS.keys()
    with pytest.raises(ValueError, match="no place for table"):
        tables.fill_tables("")


def test_no_figure_is_in_the_source() -> None:
    """They are generated from results; in a string they would stay when a result changes."""
    for known in FORMATS.values():
        assert "%" not in known.keeps + known.loads_with
