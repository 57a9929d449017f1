"""The configurations of the points of a sweep, each that of an ordinary run."""

from pathlib import Path

from dist_peft.core.config.run import RunConfig, SweepPoint
from dist_peft.core.config.sweep import apply_point

__all__ = ["count_joined", "split_sweep_configs"]


def count_joined(config: RunConfig) -> int:
    """Return how many adapters are trained at once: the points of a sweep, else 1."""
    return 1 if config.sweep is None else len(config.sweep.list_points())


def split_sweep_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Return the run configuration of each point of a sweep, ``point-000`` and so on.

    Each is that of an ordinary run of this adapter alone, in a directory of its own.
    """
    assert config.sweep is not None
    points = enumerate(config.sweep.list_points())
    return {f"point-{n:03}": _make_point_config(config, f"point-{n:03}", p) for n, p in points}


def _make_point_config(config: RunConfig, name: str, point: SweepPoint) -> RunConfig:
    changes = apply_point(point)
    return config.model_copy(
        update={
            "sweep": None,
            **{key: getattr(config, key).model_copy(update=own) for key, own in changes.items()},
            "save": config.save.model_copy(
                # writers in threads would meet those of other points in one process group
                update={"dir": str(Path(config.save.dir) / name), "asynchronous": False}
            ),
        }
    )
