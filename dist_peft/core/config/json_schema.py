"""JSON Schema (draft 2020-12) of a configuration file, for editors.

It is pydantic's schema of the sections with three changes: bounds have JSON Schema's names;
``kind`` is required wherever a section has several kinds (but for the adapter's default), so that
exactly one of them fits; and the short forms that the sections read are allowed, a path in the
place of a source.

Rules between keys are the parser's alone. An editor underlines a ``${...}`` reference in the place
of a number, although it is right.
"""

from typing import Any

from dist_peft.core.config.run import RunConfig

__all__ = ["build_json_schema"]

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
_FROM_TEXT = ("DataSource", "FusedAdapter")
"""Sections that are also read from their path alone."""
_DEFAULT_KIND = "LoraConfig"


def build_json_schema() -> dict[str, Any]:
    """Return the schema as a JSON tree."""
    schema: dict[str, Any] = _rename_bounds(RunConfig.model_json_schema())
    sections: dict[str, Any] = schema["$defs"]
    for name in sorted(_list_tagged_sections(schema) - {_DEFAULT_KIND}):
        required = sections[name].setdefault("required", [])
        sections[name]["required"] = ["kind", *(key for key in required if key != "kind")]
    for section in sections.values():
        for key, value in section["properties"].items():
            section["properties"][key] = _allow_short_forms(value)
    for key in ("train", "eval"):  # one source in the place of a list
        sources = sections["DataConfig"]["properties"][key]
        about = {name: sources.pop(name) for name in ("description", "default") if name in sources}
        sections["DataConfig"]["properties"][key] = {"anyOf": [sources, sources["items"]], **about}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dist-peft configuration",
        **{name: value for name, value in schema.items() if name != "title"},
    }


def _rename_bounds(node: Any) -> Any:
    """Return ``node`` with JSON Schema's names of bounds, and without generated titles."""
    if isinstance(node, list):
        return [_rename_bounds(item) for item in node]
    if not isinstance(node, dict):
        return node
    is_type = "type" in node or "anyOf" in node or "enum" in node
    renamed = {}
    for name, value in node.items():
        if name == "title" and isinstance(value, str):
            continue
        renamed[_BOUNDS.get(name, name) if is_type else name] = _rename_bounds(value)
    return renamed


def _list_tagged_sections(node: Any) -> set[str]:
    """Return the names of sections that ``kind`` tells apart."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    found = {name for child in children for name in _list_tagged_sections(child)}
    if isinstance(node, dict) and isinstance(node.get("discriminator"), dict):
        references = node.pop("discriminator")["mapping"].values()
        found |= {reference.rpartition("/")[2] for reference in references}
    return found


def _allow_short_forms(value: dict[str, Any]) -> dict[str, Any]:
    reference = value.get("items", {}).get("$ref", "").rpartition("/")[2]
    if reference in _FROM_TEXT:
        return value | {"items": {"anyOf": [{"type": "string"}, value["items"]]}}
    return value
