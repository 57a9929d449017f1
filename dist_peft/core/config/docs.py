"""Generate ``docs/configuration.md`` from the field descriptions of the configuration.

Regenerate it with ``python -m dist_peft.core.config.docs > docs/configuration.md``; a test
compares.
"""

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_peft.core.config import run as config
from dist_peft.core.config.adapter import FusedAdapter
from dist_peft.core.config.augment import EdaConfig, FunctionAugmentConfig, TokenDropoutConfig

__all__ = ["build_configuration_page"]

_HEAD = """# Configuration reference

Generated from `dist_peft/core/config/`; do not edit.

A run is one YAML file. Every key can be given on the command line as `key.sub=value` after the
file, and the resolved file is saved as `config.yaml` in the run directory. An unknown key is an
error that names the key of this project that it stands for in PEFT, TRL, axolotl, LLaMA-Factory or
torchtune, or the nearest known one ([other trainers](bridges.md)). On the command line a list and a
section in braces are replaced as a whole: `adapter={kind: prefix}` drops the file's `adapter`
section, `adapter.kind=prefix` changes one key of it. Only `base.path` and `data.train` have no
default.
"""

_SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("base", config.BaseConfig),
    ("base.quant", config.QuantConfig),
    ("adapter (kind: lora)", config.LoraConfig),
    ("adapter (kind: qalora)", config.QaLoraConfig),
    ("adapter (kind: vera)", config.VeraConfig),
    ("adapter (kind: loha)", config.LohaConfig),
    ("adapter (kind: lokr)", config.LokrConfig),
    ("adapter (kind: adalora)", config.AdaLoraConfig),
    ("adapter (kind: ia3)", config.Ia3Config),
    ("adapter (kind: prompt)", config.PromptConfig),
    ("adapter (kind: ptuning)", config.PTuningConfig),
    ("adapter (kind: prefix)", config.PrefixConfig),
    ("adapter (kind: bottleneck)", config.BottleneckConfig),
    ("adapter (kind: fusion)", config.FusionConfig),
    ("adapter.adapters[]", FusedAdapter),
    ("adapter (kind: full)", config.FullConfig),
    ("adapter (kind: partial)", config.PartialConfig),
    ("adapter.unfreeze[]", config.UnfreezeConfig),
    ("adapter (kind: none)", config.NoAdapterConfig),
    ("engine", config.EngineConfig),
    ("data", config.DataConfig),
    ("data.train[] and data.eval[]", config.DataSource),
    ("data.train[].augment (kind: eda)", EdaConfig),
    ("data.train[].augment (kind: token_dropout)", TokenDropoutConfig),
    ("data.train[].augment (kind: function)", FunctionAugmentConfig),
    ("train", config.TrainConfig),
    ("train.scheduled_sampling", config.ScheduledSamplingConfig),
    ("train.domain_adversarial", config.DomainAdversarialConfig),
    ("save", config.SaveConfig),
    ("sweep", config.SweepConfig),
    ("sweep.points[]", config.SweepPoint),
    ("sweep.halving", config.HalvingConfig),
]


def build_configuration_page() -> str:
    """Return the whole page as Markdown."""
    parts = [_HEAD]
    for title, model in _SECTIONS:
        about = " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())
        rows = [_format_table_row(name, field) for name, field in model.model_fields.items()]
        head = "| key | type | default | meaning |\n|---|---|---|---|"
        parts.append(f"## {title}\n\n{about}\n\n{head}\n" + "\n".join(rows) + "\n")
    resume = _format_table_row("resume", config.RunConfig.model_fields["resume"])
    parts.append(f"## resume\n\n| key | type | default | meaning |\n|---|---|---|---|\n{resume}\n")
    return "\n".join(parts)


def _format_table_row(name: str, field: FieldInfo) -> str:
    cells = (
        f"`{name}`",
        _format_type(field.annotation),
        _format_default(field),
        field.description or "",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _format_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "see its section"
    if isinstance(value, tuple):
        value = list(value)
    shown = {None: "null", True: "true", False: "false"}.get(value) if _is_hashable(value) else None
    return f"`{shown or value}`"


def _is_hashable(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _format_type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " ".join(f"`{a}`" for a in args)
    if origin is Annotated:
        return _format_type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_format_type(a) for a in args)
    if origin is list:
        return f"list of {_format_type(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_format_type(args[0])}"
    if origin is dict:
        return f"map of {_format_type(args[1])}"
    if annotation is type(None):
        return "null"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "section")


if __name__ == "__main__":
    print(build_configuration_page(), end="")
