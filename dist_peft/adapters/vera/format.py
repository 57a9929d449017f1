"""VeRA on disk, in the format of Hugging Face PEFT.

::

    adapter_config.json         PEFT's VeraConfig
    adapter_model.safetensors   base_model.model.PATH.vera_lambda_b [out], .vera_lambda_d [r]
                                base_model.vera_A [r, largest in], base_model.vera_B
                                [largest out, r], with save_projection

Without ``save_projection`` the projections are drawn again from ``projection_prng_key``; their
sizes are those of the largest adapted linears, which a merge learns from the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_peft.adapters.low_rank.delta_merger import DeltaMerger, ProductDelta
from dist_peft.adapters.peft_tensors import (
    build_linears_config,
    check_tensor_shape,
    group_peft_tensors,
    name_module_tensors,
    to_json_number,
)
from dist_peft.adapters.protocol import PeftFormat, PublicAdapter
from dist_peft.adapters.vera.projections import draw_projections
from dist_peft.core.config.run import VeraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span

__all__ = ["VeraFormat", "VeraMerger", "build_public_vera"]

_PAIR = ("vera_A", "vera_B")


class VeraFormat(PeftFormat):
    """VeRA in PEFT's files: two vectors a module, and the shared projections."""

    peft_types = ("VERA",)
    on_gptq_linears = False

    def check(self, public: PublicAdapter) -> None:
        """Check vectors and projections against the configuration.

        Raises:
            UserError: see ``VeraMerger``.
        """
        VeraMerger(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type, rank, and where the projections are."""
        kept = "saved" if config.get("save_projection", True) else "from their seed"
        return f"VERA r={config.get('r')} projections={kept}"

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> "VeraMerger":
        """Return the merger.

        Raises:
            UserError: see ``VeraMerger``.
        """
        return VeraMerger(public)


@dataclass(frozen=True)
class _VeraDelta:
    """``b B d A`` of one module, with the first rows of ``B`` and columns of ``A``."""

    d: Tensor
    b: Tensor
    pair: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int | None]:
        return len(self.b), None

    def add_to_rows(self, rows: Tensor, span: Span) -> Tensor:
        """Return ``rows`` with rows ``span`` of the change added, float32."""
        left = self.b[:, None] * self.pair["vera_B"][: len(self.b)]
        right = self.d[:, None] * self.pair["vera_A"][:, : rows.shape[1]]
        return ProductDelta(left, right).add_to_rows(rows, span)


class VeraMerger(DeltaMerger):
    """Merges the product of each module.

    Args:
        public: ours or PEFT's own.

    Raises:
        UserError: a tensor is empty, absent or has a shape that the configuration does not say.
    """

    def __init__(self, public: PublicAdapter) -> None:
        config = public.config
        modules = group_peft_tensors(
            public,
            ("vera_lambda_b", "vera_lambda_d"),
            "VeRA",
            whole_adapter=_PAIR,
        )
        if config.get("bias", "none") != "none":
            raise UserError("the VeRA adapter was trained with bias; merge it with PEFT itself")
        self._r, self._seed = _read_rank_and_seed(config)
        self._pair: dict[str, Tensor] = {}
        deltas = {}
        for path, own in modules.items():
            d = check_tensor_shape(path, own, "vera_lambda_d", (self._r,))
            b = check_tensor_shape(path, own, "vera_lambda_b", (None,))
            deltas[path] = _VeraDelta(d, b, self._pair)
        if config.get("save_projection", True):
            self._pair |= _read_projections(public, self._r)
            widest = max(len(delta.b) for delta in deltas.values())
            if len(self._pair["vera_B"]) < widest:
                raise UserError(
                    f"adapter tensor base_model.vera_B has {len(self._pair['vera_B'])} rows, and a "
                    f"module has {widest} outputs: they are of two adapters"
                )
        super().__init__("VeRA", deltas)

    def check_weight_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Compare with the base's shapes, from which projections that are not saved are drawn.

        Raises:
            UserError: see ``WeightMerger``.
        """
        super().check_weight_shapes(shapes)
        adapted = {weight: shape for weight, shape in shapes.items() if self.changes_weight(weight)}
        if not self._pair:
            A, B = draw_projections(self._r, adapted.values(), self._seed)
            self._pair |= {"vera_A": A, "vera_B": B}
        most = self._pair["vera_A"].shape[1]
        for weight, (_, columns) in adapted.items():
            if columns > most:
                raise UserError(
                    f"{weight}: the base's has {columns} columns, and the adapter's projection "
                    f"vera_A is for at most {most}; it belongs to another base"
                )


def _read_projections(public: PublicAdapter, r: int) -> dict[str, Tensor]:
    found = {}
    for side, name in enumerate(_PAIR):  # vera_A [r, in], vera_B [out, r]
        value = public.tensors.get(f"base_model.{name}")
        if value is None or value.dim() != 2 or value.shape[side] != r:
            shown = "is absent" if value is None else f"has shape {list(value.shape)}"
            raise UserError(
                f"adapter tensor base_model.{name} {shown}; save_projection in adapter_config.json "
                f"promises a matrix of rank {r}: get the adapter again"
            )
        found[name] = value.float()
    return found


def _read_rank_and_seed(config: Mapping[str, Any]) -> tuple[int, int]:
    r, seed = config.get("r"), config.get("projection_prng_key", 0)
    if not isinstance(r, int) or r < 1 or not isinstance(seed, int):
        raise UserError(
            f"adapter_config.json gives no usable r and projection_prng_key: {r!r}, {seed!r}"
        )
    return r, seed


def build_public_vera(
    config: VeraConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    projections: tuple[Tensor, Tensor] | None,
    target_names: Sequence[str],
    base: str,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        modules: module path -> own parameter name -> whole tensor.
        projections: ``A`` and ``B``; None: not saved.
        target_names: PEFT's ``target_modules``.
        base: path or hub id of the base.
    """
    public = {
        **build_linears_config("VERA", target_names, base),
        "r": config.r,
        "projection_prng_key": config.projection_seed,
        "save_projection": config.save_projection,
        "vera_dropout": to_json_number(config.dropout),
        "d_initial": config.d_initial,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }
    tensors = name_module_tensors(modules)
    if projections is not None:
        tensors |= {f"base_model.{name}": v for name, v in zip(_PAIR, projections, strict=True)}
    return PublicAdapter(public, tensors)
