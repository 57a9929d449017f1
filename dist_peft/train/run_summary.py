"""Facts about a run that its report shows and its metrics do not have."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from dist_peft.core.config.run import RunConfig
from dist_peft.core.redaction import redact_text

__all__ = ["Row", "RunSummary"]

Row = tuple[str, str]
"""Label and value of a table's row."""


@dataclass(frozen=True)
class RunSummary:
    """Facts about a run that are not in its metrics.

    Attributes:
        model: path or hub id of the base.
        adapter: method and its main settings.
        base_storage: how the frozen linears are stored.
        engine: kind of the engine.
        ranks: number of processes.
        facts: further rows of the summary table, such as parameter counts.
        data: rows about the training data.
        environment: rows about versions, hardware and the command.
        layer_norms: norm of what was trained, by block (``app.layer_norms``).
        norm_meaning: the quantity that the norms are of.
    """

    model: str
    adapter: str
    base_storage: str
    engine: str
    ranks: int
    facts: tuple[Row, ...] = ()
    data: tuple[Row, ...] = ()
    environment: tuple[Row, ...] = ()
    layer_norms: tuple[tuple[str, float], ...] = ()
    norm_meaning: str = ""

    @classmethod
    def from_config(
        cls, config: RunConfig, *, engine: str, ranks: int, facts: Iterable[Row] = ()
    ) -> Self:
        """Build from a run's configuration; ``engine``: the resolved kind where the config says
        auto."""
        # transformers takes seconds to import, which drawing a report again need not wait for
        from dist_peft.model.skeleton import parse_torch_dtype
        from dist_peft.quant.codec import make_codec

        adapter, base = config.adapter, config.base
        chosen = adapter.model_dump(exclude={"kind"}, exclude_defaults=True)
        always = adapter.model_dump(include={"r", "alpha"})
        settings = ", ".join(
            _format_setting(key, value) for key, value in (always | chosen).items()
        )
        codec = make_codec(base.quant, parse_torch_dtype(base.compute_dtype))
        return cls(
            model=redact_text(base.path),
            adapter=redact_text(f"{adapter.kind} ({settings})" if settings else adapter.kind),
            base_storage=codec.describe_storage(),
            engine=engine,
            ranks=ranks,
            facts=tuple(facts),
        )


def _format_setting(key: str, value: object) -> str:
    """Format a setting as ``r 16``, ``use_dora``, ``target_modules q_proj v_proj``."""
    if value is True:
        return key
    if isinstance(value, list):
        value = " ".join(map(_format_list_item, value))
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def _format_list_item(value: object) -> str:
    """Format an item of a list; a section by its name or path."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("path") or value
    return str(value)
