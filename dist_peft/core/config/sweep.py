"""The ``sweep`` section: several adapters that are trained at once on one base."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dist_peft.core.config.data import DataSource, read_bare_paths
from dist_peft.core.config.types import ConfigSection, Count, Float, Int, Names, Positive, Size

__all__ = ["HalvingConfig", "SweepConfig", "SweepPoint", "apply_point"]

MOST_POINTS = 256

Dropout = Annotated[Float, Field(ge=0, lt=1)]
Decay = Annotated[Float, Field(ge=0)]
Sources = Annotated[list[DataSource], BeforeValidator(read_bare_paths)]


class SweepPoint(ConfigSection):
    """Values of one adapter of a sweep; null: that of the rest of the configuration."""

    lr: Positive | None = Field(None, description="Its train.lr.")
    seed: Int | None = Field(None, ge=0, description="Its train.seed.")
    r: Size | None = Field(None, description="Its adapter.r.")
    alpha: Positive | None = Field(None, description="Its adapter.alpha.")
    target_modules: Literal["all-linear"] | Names | None = Field(
        None, description="Its adapter.target_modules."
    )
    dropout: Dropout | None = Field(None, description="Its adapter.dropout.")
    use_rslora: bool | None = Field(None, description="Its adapter.use_rslora.")
    lr_ratio: Positive | None = Field(None, description="Its adapter.lr_ratio (LoRA+).")
    weight_decay: Decay | None = Field(None, description="Its train.weight_decay.")
    data: Sources | None = Field(None, min_length=1, description="Its data.train.")


class HalvingConfig(ConfigSection):
    """Successive halving (Jamieson and Talwalkar 2016): after each ``every`` steps the points with
    the highest held-out losses stop."""

    every: Count = Field(description="Steps between two choices; a multiple of train.eval_every.")
    keep: Positive = Field(
        0.5, lt=1, description="Share of the points that continues, rounded up; at least one does."
    )


class SweepConfig(ConfigSection):
    """Several LoRA adapters trained at once on one base.

    One for each combination of the listed values, or for each of ``points``. The base is stored,
    gathered and dequantized once for all of them.
    """

    lr: list[Positive] = Field([], description="Values of train.lr.")
    seed: list[Int] = Field([], description="Values of train.seed: start values and data order.")
    r: list[Size] = Field([], description="Values of adapter.r.")
    alpha: list[Positive] = Field([], description="Values of adapter.alpha.")
    target_modules: list[Literal["all-linear"] | Names] = Field(
        [], description="Values of adapter.target_modules."
    )
    dropout: list[Dropout] = Field([], description="Values of adapter.dropout.")
    use_rslora: list[bool] = Field([], description="Values of adapter.use_rslora.")
    lr_ratio: list[Positive] = Field([], description="Values of adapter.lr_ratio (LoRA+).")
    weight_decay: list[Decay] = Field([], description="Values of train.weight_decay.")
    data: list[Sources] = Field(
        [], description="Values of data.train, each a list of sources: [[a.jsonl], [b.jsonl]]."
    )
    points: list[SweepPoint] = Field([], description="Instead of all combinations.")
    halving: HalvingConfig | None = Field(None, description="null: all points train to the end.")

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        listed = [name for name in SweepPoint.model_fields if getattr(self, name)]
        if listed and self.points:
            raise ValueError(f"give points, or lists such as {listed[0]}, not both")
        points = self.list_points()
        if not 2 <= len(points) <= MOST_POINTS:
            raise ValueError(
                f"a sweep has 2 to {MOST_POINTS} points, not {len(points)}; list values of lr, "
                "seed, r, alpha, data or another key, or give points"
            )
        for number, point in enumerate(points):
            if point in points[:number]:
                raise ValueError(f"points {points.index(point)} and {number} are equal")
        return self

    def list_points(self) -> list[SweepPoint]:
        """Return ``points``, or all combinations of the lists, the last list varying fastest."""
        names = [name for name in SweepPoint.model_fields if getattr(self, name)]
        if not names:
            return list(self.points)
        values = itertools.product(*(getattr(self, name) for name in names))
        return [SweepPoint(**dict(zip(names, each, strict=True))) for each in values]


_SECTIONS = {"lr": "train", "seed": "train", "weight_decay": "train", "data": "data"}
"""Key of a point -> section of the configuration; others are of ``adapter``."""


def apply_point(point: SweepPoint) -> dict[str, dict[str, Any]]:
    """Return the values of a point by section and key of the configuration."""
    changes: dict[str, dict[str, Any]] = {"adapter": {}, "train": {}, "data": {}}
    for key in SweepPoint.model_fields:
        if (value := getattr(point, key)) is not None:
            section = _SECTIONS.get(key, "adapter")
            changes[section]["train" if key == "data" else key] = value
    return changes
