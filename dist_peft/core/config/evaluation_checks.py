"""Options that need evaluations, or a score that the objective does not have."""

from collections.abc import Mapping

from dist_peft.core.config.data import DataConfig

__all__ = ["check_evaluation_options"]


def check_evaluation_options(
    selects: Mapping[str, object], metric: str, data: DataConfig, has_evaluations: bool
) -> None:
    """Check the options that choose by held-out results.

    Args:
        selects: value by key of those that do.
        metric: ``train.metric_for_best``.
        has_evaluations: whether held-out data are evaluated during training.

    Raises:
        ValueError: there are no such results; names the key and the fix.
    """
    for key, is_set in selects.items():
        if is_set and not has_evaluations:
            raise ValueError(f"{key} needs data.eval or data.val_split, and train.eval_every")
    if metric != "loss" and not data.is_classification:
        raise ValueError(
            f"train.metric_for_best: {metric} is a score of base.head classifier; use loss"
        )
    if metric == "f1" and [s.positive_label is None for s in data.labelled] != [False]:
        raise ValueError(
            "train.metric_for_best: f1 is that of one task and label: give one training "
            "source with positive_label, or use macro_f1"
        )
    if metric != "loss" and not any(selects.values()):
        raise ValueError(
            f"train.metric_for_best: {metric} has no effect without train.early_stop or "
            "save.keep_best"
        )
