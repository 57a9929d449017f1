"""Strict base class of all configuration sections, and the types of their keys."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from dist_peft.core.input_paths import find_path_fault

__all__ = [
    "Beta",
    "ConfigSection",
    "Count",
    "Float",
    "Int",
    "Label",
    "Names",
    "PathText",
    "Positive",
    "Size",
    "SourcePath",
]


def _refuse_boolean(value: Any) -> Any:
    """Refuse booleans where a number is expected, since Python counts ``True`` as 1."""
    if isinstance(value, bool):
        raise ValueError("expected a number, got a boolean")
    return value


def _refuse_blank_path(value: str) -> str:
    return value if value.strip() and "\0" not in value else _refuse_impossible_path(value)


def _refuse_impossible_path(value: str) -> str:
    if (fault := find_path_fault(value)) is not None:
        raise ValueError(fault)
    return value


def _format_whole_number(value: Any) -> Any:
    """Return a whole number as text; refuse booleans and fractions: YAML lost their spelling."""
    if isinstance(value, bool | float):
        raise ValueError(
            "write a label that YAML takes for a truth value or a fraction (yes, off, true, 1.0) "
            "in quotes, as the table has it"
        )
    return str(value) if isinstance(value, int) else value


Int = Annotated[int, BeforeValidator(_refuse_boolean), Field(lt=2**63)]
Float = Annotated[float, BeforeValidator(_refuse_boolean)]
SourcePath = Annotated[str, AfterValidator(_refuse_blank_path)]
Size = Annotated[Int, Field(ge=1, le=2**16)]
"""A rank or a number of tokens: beyond the limit no machine could hold the parameters."""
PathText = Annotated[str, AfterValidator(_refuse_impossible_path)]
Count = Annotated[Int, Field(ge=1, lt=2**31)]
Positive = Annotated[Float, Field(gt=0)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Label = Annotated[
    str,
    BeforeValidator(_format_whole_number),
    WithJsonSchema({"type": ["string", "integer"]}),
]
Names = Annotated[list[str], Field(min_length=1)]


class ConfigSection(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
