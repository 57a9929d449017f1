"""Options that a ``sweep`` refuses, because its adapters share a base, its passes and a process."""

from operator import attrgetter
from typing import cast

from pydantic import ValidationError

from dist_peft.core.config.sweep import SweepConfig, apply_point
from dist_peft.core.config.types import ConfigSection

__all__ = ["check_sweep_options"]

_ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "adapter.kind": (
        ("lora", "qalora", "adalora", "vera", "loha", "lokr", "ia3"),
        "has no product of its own for some rows of a batch; use lora, qalora, adalora, vera, "
        "loha, lokr or ia3",
    ),
    "adapter.init": (
        ("default", "pissa", "loftq"),
        "derives its start from the training data, by passes before the training; use default, "
        "pissa or loftq",
    ),
    "adapter.keep_zeros": ((False,), "decodes the base's weight for each adapter"),
    "adapter.through_quantizer": ((False,), "trains the bytes of the base that all adapters share"),
    "base.head": (("lm",), "has a head of its own for each adapter"),
    "train.tasks": (("mixed",), "trains its adapters one after the other; leave it out"),
    "train.neftune_alpha": ((0.0,), "adds noise to whole batches"),
    "train.scheduled_sampling": ((None,), "computes its inputs by a pass of its own"),
    "train.domain_adversarial": ((None,), "has a discriminator of its own for each adapter"),
    "resume": (("auto", "never"), "names a checkpoint, which is of one point; use auto or never"),
}
"""Key -> values that are allowed, and the reason that others are not."""


def check_sweep_options(
    sweep: SweepConfig, config: object, eval_every: int, has_held_out: bool
) -> None:
    """Check the options of a run with a ``sweep``.

    Args:
        config: the whole configuration, by whose attributes keys are looked up.
        eval_every: ``train.eval_every``.
        has_held_out: whether there are held-out data.

    Raises:
        ValueError: an option that adapters trained at once cannot have; says why.
    """
    for key, (allowed, reason) in _ALLOWED.items():  # the kind first: others lack some keys
        section, _, name = key.rpartition(".")
        value = getattr(attrgetter(section)(config) if section else config, name, allowed[0])
        if value not in allowed:
            shown = value if isinstance(value, str | int | float) else "a section"
            raise ValueError(f"sweep: {key} {shown} {reason}; or run the points one by one")
    if "trackio" in attrgetter("save.track")(config):
        raise ValueError(
            "sweep: save.track trackio follows one run in a process; use wandb or mlflow, or read "
            "metrics.jsonl of the points"
        )
    _check_points(sweep, cast(ConfigSection, config))
    _check_common_start(sweep, config)
    data = attrgetter("data")(config)
    if sweep.halving is not None and data.val_split and _differ(sweep, "data", data.train):
        raise ValueError(
            "sweep.halving compares held-out losses, and with data.val_split points of other data "
            "have other held-out records; name held-out files in data.eval"
        )
    if sweep.halving is not None and not (
        has_held_out and eval_every and sweep.halving.every % eval_every == 0
    ):
        raise ValueError(
            "sweep.halving compares held-out losses: it needs data.eval or data.val_split, and a "
            f"train.eval_every that divides its every, {sweep.halving.every}"
        )


def _differ(sweep: SweepConfig, key: str, default: object) -> bool:
    values = [getattr(point, key) for point in sweep.list_points()]
    effective = [default if value is None else value for value in values]
    return any(value != effective[0] for value in effective)


def _check_common_start(sweep: SweepConfig, config: object) -> None:
    """Refuse points with other bases: PiSSA and LoftQ quantize what is left of their start."""
    adapter, seed = attrgetter("adapter", "train.seed")(config)
    init = getattr(adapter, "init", "")
    for key in ("r", "alpha", "use_rslora", "seed", "target_modules"):
        default = seed if key == "seed" else getattr(adapter, key, None)
        if init in ("pissa", "loftq") and _differ(sweep, key, default):
            raise ValueError(
                f"sweep: points have different {key}; with adapter.init {init} the quantized base "
                f"is what the start leaves of the weights, which depends on {key}, and all points "
                "share one base; vary other keys, or run the points one by one"
            )


def _check_points(sweep: SweepConfig, config: ConfigSection) -> None:
    """Check that each point is a valid configuration by itself."""
    given = config.model_dump(exclude={"sweep"}, exclude_unset=True)
    for number, point in enumerate(sweep.list_points()):
        changes = apply_point(point)
        for section, own in changes.items():
            known = type(getattr(config, section)).model_fields
            if unknown := [key for key in own if key not in known]:
                kind = attrgetter("adapter.kind")(config)
                raise ValueError(f"sweep: point {number} has {unknown[0]}, not a key of {kind}")
        alone = given | {key: given.get(key, {}) | own for key, own in changes.items()}
        try:
            type(config).model_validate(alone)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = str(first["msg"]).removeprefix("Value error, ")
            raise ValueError(f"sweep: point {number}: {place and place + ': '}{reason}") from None
