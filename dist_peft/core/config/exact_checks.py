"""Options that ``train.exact`` refuses, because their arithmetic depends on ranks or on the run."""

from collections.abc import Mapping

__all__ = ["check_exact_options"]

_ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "train.optimizer": (
        ("adamw",),
        "shares a scale among 256 values of a rank's shard, or updates in kernels of its own",
    ),
    "engine.shard_group": (("all",), "adds up the sums of groups of ranks as floats"),
    "engine.cpu_offload": (
        ("none",),
        "computes norms or updates in code of its library, on another processor",
    ),
    "engine.deepspeed_config": (
        (None,),
        "may change when and in which type DeepSpeed passes gradients on",
    ),
    "base.attention": (
        ("auto", "sdpa", "eager"),
        "is a library of its own, whose backward pass adds up in another order each time",
    ),
    "engine.gather_experts": (
        ("all", "routed"),
        "multiplies rows of all ranks together, and sums the gradients of factors over them",
    ),
    "engine.kernels": (
        ("own",),
        "is another package, whose sums have an order of their own in each of its versions",
    ),
    "train.domain_adversarial": ((None,), "weights its loss by sums over a rank's micro-batches"),
}
"""Key -> values that are allowed, and the reason that others are not."""

_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "adapter.init": (
        ("pissa", "loftq"),
        "finds its factors by float sums over the ranks' rows; use default, eva or lora_ga",
    ),
}
"""Key -> values that are refused, and the reason."""


def check_exact_options(values: Mapping[str, object]) -> None:
    """Check the options of a run with ``train.exact``.

    Args:
        values: by key; keys that a section lacks are left out.

    Raises:
        ValueError: an option whose arithmetic depends on the number of ranks; says why.
    """
    for key, value in values.items():
        allowed, reason = _ALLOWED.get(key, ((value,), ""))
        refused, why = _REFUSED.get(key, ((), ""))
        if value not in allowed or value in refused:
            shown = value if isinstance(value, str | int | float) else "a section"
            raise ValueError(
                f"train.exact: {key} {shown} {reason or why}; leave it out, or set train.exact: "
                "false"
            )
