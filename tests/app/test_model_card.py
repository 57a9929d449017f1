"""The card of a run's adapter and of its exports says what their files say."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dist_peft.app import cli
from dist_peft.app.model_card import write_model_card
from dist_peft.app.verified_export import export_finished_run
from dist_peft.core.log import close_log
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.gguf_format import GgufExport
from dist_peft.export.model_directory import WriteResult
from dist_peft.train.step_metrics import read_metrics
from tests.support.tiny_runs import tiny_tree, train


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    close_log()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card")
    assert train(tiny_tree(path, base__quant={"kind": "nf4"})) == 0
    for verb in (["merge", "--dtype", "float32"], ["export", "--format", "peft"]):
        out = str(path / verb[0])
        assert cli.main([*verb, "--run", str(path / "run"), "--out", out, "--no-verify"]) == 0
    close_log()
    return path


@pytest.mark.e2e
def test_card_of_the_runs_adapter(place: Path) -> None:
    card = ModelCard.load(place / "run" / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["dist_peft", "lora"]
    assert card.data.base_model is None  # a directory of this machine is no id
    records = read_metrics(place / "run" / "metrics.jsonl")
    weights = (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for text in (
        "# run, adapter",
        "| Base | base, frozen, stored as nf4, 4 bits in groups of 64 (codec version 1) |",
        "| Method | lora r 4 alpha 8.0 init default |",
        "| Training data | train.jsonl |",
        "| Held-out data | eval.jsonl |",
        f"| Training loss | {records[0].loss:.4f} to {records[-1].loss:.4f} |",
        f"| Held-out loss | {records[0].eval_loss_before:.4f} to {records[-1].eval_loss:.4f} |",
        f"`{hashlib.sha256(weights).hexdigest()}`",
        "Served as an adapter by vLLM: yes.",
        "`--format gguf`; the adapter alone: `gguf-lora`",
    ):
        assert text in card.content, text
    assert str(place) not in card.content


@pytest.mark.e2e
def test_cards_of_exports(place: Path) -> None:
    merged = (place / "merge" / "README.md").read_text()
    record = json.loads((place / "merge" / "merge_record.json").read_text())
    assert yaml.safe_load(merged.split("---")[1])["library_name"] == "transformers"
    assert f"| Hash of the adapter in it | `{record['adapter']}` |" in merged
    assert 'AutoModelForCausalLM.from_pretrained("DIRECTORY")' in merged
    exported = (place / "export" / "README.md").read_text()
    assert "# export, peft" in exported and "PeftModel.from_pretrained" in exported


@pytest.mark.e2e
def test_card_of_the_base_is_kept(place: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("license: own")
    for _ in range(2):
        write_model_card(place / "run", tmp_path, "hf-bf16")
        assert (tmp_path / "README.base.md").read_text() == "license: own"
        assert "- dist_peft" in (tmp_path / "README.md").read_text()


@pytest.mark.e2e
def test_hub_id_and_form_that_peft_does_not_read(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(place / "base"), "org/na|me"))
    settings = tmp_path / "run" / "adapter" / "adapter_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps({**config, "peft_type": "QALORA"}))
    path = write_model_card(tmp_path / "run", tmp_path / "run" / "adapter", "adapter")
    text = path.read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/na|me"
    assert "| Base | na\\|me, frozen" in text
    assert "PEFT does not read this directory" in text and "peft-expanded" in text


@pytest.mark.e2e
def test_cards_of_gguf_files(place: Path, tmp_path: Path) -> None:
    """The same facts as on the card of a merged directory, and how llama.cpp loads the file."""
    record = json.loads((place / "merge" / "merge_record.json").read_text())
    facts = (place / "merge" / "README.md").read_text().split("| --- | --- |")[1].split("\n\n")[0]
    for name in ("mine.gguf", "sub.dir"):
        (tmp_path / name.removesuffix(".gguf")).mkdir(exist_ok=True)
    file = tmp_path / "v1.5-mine.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "sub.dir" / "model-q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "mine" / "adapter.gguf").write_bytes(b"GGUF")
    for output, card, form, load in (
        (file, "v1.5-mine.README.md", "gguf", "`llama-server -m v1.5-mine.gguf`"),
        (tmp_path / "sub.dir", "sub.dir/README.md", "gguf", "-m model-q8_0.gguf`"),
        (tmp_path / "mine", "mine/README.md", "gguf-lora", "-m BASE.gguf --lora adapter.gguf`"),
    ):
        path = write_model_card(place / "run", output, form)
        assert path == tmp_path / card
        text = path.read_text()
        assert facts in text and record["adapter"] in facts and load in text
        assert yaml.safe_load(text.split("---")[1])["tags"] == ["dist_peft", "lora", "gguf"]
    assert file.read_bytes() == b"GGUF"


@pytest.mark.e2e
def test_file_of_the_cards_name_is_kept(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file := tmp_path / "mine.gguf").write_bytes(b"GGUF")
    (own := tmp_path / "mine.README.md").write_text("mine")
    write_model_card(place / "run", file, "gguf")
    assert own.read_text() == "mine" and "no card was written" in caplog.text
    own.unlink()
    for _ in range(2):  # a card of ours is replaced
        assert "- gguf" in write_model_card(place / "run", file, "gguf").read_text()


@pytest.mark.e2e
def test_export_writes_the_card_of_a_gguf_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: GgufExport, job: ExportSpec) -> ExportResult:
        file = job.out if job.out.suffix else job.out / "model-q8_0.gguf"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"GGUF")
        return ExportResult(WriteResult(0, 0, 0, 4), file, "merged")

    monkeypatch.setattr(GgufExport, "write_export", write)
    for out, card in (("a.gguf", "a.README.md"), ("b", "b/README.md")):
        export_finished_run(place / "run", "gguf", tmp_path / out, {}, verify=None)
        assert f"# {out}, gguf" in (tmp_path / card).read_text()
