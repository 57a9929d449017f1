"""Strict base class of all configuration sections, and the types of their keys."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Beta", "ConfigSection", "Count", "Float", "Int", "Label", "Names", "Positive"]


def _refuse_boolean(value: Any) -> Any:
    """Refuse booleans where a number is expected, since Python counts ``True`` as 1."""
    if isinstance(value, bool):
        raise ValueError("expected a number, got a boolean")
    return value


def _format_whole_number(value: Any) -> Any:
    """Return a whole number as text; refuse booleans and fractions: YAML lost their spelling."""
    if isinstance(value, bool | float):
        raise ValueError(
            "write a label that YAML takes for a truth value or a fraction (yes, off, true, 1.0) "
            "in quotes, as the table has it"
        )
    return str(value) if isinstance(value, int) else value


Int = Annotated[int, BeforeValidator(_refuse_boolean)]
Float = Annotated[float, BeforeValidator(_refuse_boolean)]
Count = Annotated[Int, Field(ge=1)]
Positive = Annotated[Float, Field(gt=0)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Label = Annotated[str, BeforeValidator(_format_whole_number)]
Names = Annotated[list[str], Field(min_length=1)]


class ConfigSection(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
