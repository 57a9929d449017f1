"""Arguments and result of a format's writer; what writers do with them is tested by format."""

from dataclasses import fields, is_dataclass

from dist_peft.export.formats.export_spec import ExportResult, ExportSpec


def test_every_field_of_a_result_is_reported() -> None:
    assert is_dataclass(ExportSpec) and is_dataclass(ExportResult)
    names = {field.name for field in fields(ExportResult)}
    assert {"path", "how", "exact", "written"} <= names
