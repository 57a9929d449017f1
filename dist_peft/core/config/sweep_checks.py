"""Options that a ``sweep`` refuses, because its adapters share a base, its passes and a process."""

from operator import attrgetter

from dist_peft.core.config.sweep import SweepConfig

__all__ = ["check_sweep_options"]

_ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "adapter.kind": (("lora",), "has no product of its own for some rows of a batch yet; use lora"),
    "adapter.init": (
        ("default",),
        "derives its start from the base's rows or the training data, and may change the base "
        "that all adapters share; use default",
    ),
    "adapter.use_dora": ((False,), "multiplies the base's weight by its own factors once more"),
    "adapter.keep_zeros": ((False,), "decodes the base's weight for each adapter"),
    "adapter.through_quantizer": ((False,), "trains the bytes of the base that all adapters share"),
    "adapter.embeddings": ((False,), "adapts the embedding, which is not split by rows yet"),
    "base.head": (("lm",), "has a head of its own for each adapter"),
    "engine.kind": (
        ("auto", "single", "fsdp2"),
        "has one optimizer and one gradient norm for all parameters (DeepSpeed); use fsdp2",
    ),
    "train.tasks": (("mixed",), "trains its adapters one after the other; leave it out"),
    "train.exact": (
        (False,),
        "promises the bits of a run alone, and products of joined batches round otherwise",
    ),
    "train.neftune_alpha": ((0.0,), "adds noise to whole batches"),
    "train.scheduled_sampling": ((None,), "computes its inputs by a pass of its own"),
    "train.domain_adversarial": ((None,), "has a discriminator of its own for each adapter"),
    "save.track": (([],), "can follow one run in a process; read metrics.jsonl of the points"),
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
        value = attrgetter(key)(config)
        if value not in allowed:
            shown = value if isinstance(value, str | int | float) else "a section"
            raise ValueError(f"sweep: {key} {shown} {reason}; or run the points one by one")
    if sweep.halving is not None and not (
        has_held_out and eval_every and sweep.halving.every % eval_every == 0
    ):
        raise ValueError(
            "sweep.halving compares held-out losses: it needs data.eval or data.val_split, and a "
            f"train.eval_every that divides its every, {sweep.halving.every}"
        )
