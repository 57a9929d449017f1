"""Every format has a row, options and forms that the command line can name."""

from pathlib import Path

import pytest

from dist_peft.export.formats.export_format import BITS, ExportFormat, ExportOption
from dist_peft.export.formats.export_spec import ExportResult
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.model_directory import WriteResult


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_class_is_complete(known: ExportFormat) -> None:
    assert FORMATS[known.name] is known and known.keeps and known.loads_with
    assert known.forms[0].label == known.name and not known.forms[0].options
    keys = {option.key for option in known.options}
    assert all(form.options.keys() <= keys for form in known.forms)


def test_key_of_an_option() -> None:
    assert ExportOption("keep-adapter", "", {}).key == "keep_adapter"
    assert BITS in FORMATS["gptq"].options and BITS in FORMATS["mlx"].options


def test_content_depends_on_options() -> None:
    contents = {name: known.get_content({}) for name, known in FORMATS.items()}
    assert [name for name, content in contents.items() if content == "adapter"] == [
        "peft",
        "peft-expanded",
        "peft-experts",
        "gguf-lora",
        "mlx-adapter",
    ]
    separate = {"gptq", "compressed-tensors"}
    assert {name for name, content in contents.items() if content == "separate"} == separate
    assert FORMATS["gptq"].get_content({"merge": True}) == "merged"
    assert FORMATS["bnb-nf4"].get_content({"keep_adapter": True}) == "separate"


def test_line_after_an_export(tmp_path: Path) -> None:
    written = WriteResult(tensors=9, packed=7, merged=5, bytes_written=3 * 2**20)
    result = ExportResult(written, tmp_path / "out", "merged")
    line = FORMATS["mlx"].describe_result(result)
    assert line == f"{result.path}, merged: 7 weights packed, 3.0 MiB"
    line = FORMATS["hf-bf16"].describe_result(result)
    assert line == f"{result.path}, merged: 9 tensors, 5 of them merged, 3.0 MiB"
