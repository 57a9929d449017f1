import pytest

from dist_peft.core.config.data import DataConfig
from dist_peft.core.config.evaluation_checks import check_evaluation_options

PLAIN = DataConfig(train=["a.jsonl"])  # type: ignore[list-item]


def test_choices_need_evaluations() -> None:
    check_evaluation_options({"save.keep_best": False}, "loss", PLAIN, False)
    check_evaluation_options({"save.keep_best": True}, "loss", PLAIN, True)
    with pytest.raises(ValueError, match=r"save.keep_best needs data.eval"):
        check_evaluation_options({"save.keep_best": True}, "loss", PLAIN, False)


def test_scores_are_those_of_classifiers() -> None:
    with pytest.raises(ValueError, match=r"accuracy is a score of base.head classifier"):
        check_evaluation_options({"train.early_stop": 1}, "accuracy", PLAIN, True)
