import pytest

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError
from dist_peft.data.labels import find_source_task, list_class_names, list_class_tasks


def source(path: str, *labels: str, **fields: str) -> dict[str, object]:
    return {"path": path, "format": "classification", "labels": list(labels), **fields}


def config(*train: dict[str, object]) -> DataConfig:
    return DataConfig.model_validate({"train": list(train)})


TWO = (source("d/rte.tsv", "yes", "no"), source("d/train.tsv", "0", "1", "2", name="nli"))


def test_tasks_share_one_list_of_classes() -> None:
    assert list_class_names(config(TWO[0])) == ["yes", "no"]
    both = config(*TWO)
    assert list_class_names(both) == ["rte/yes", "rte/no", "nli/0", "nli/1", "nli/2"]
    rte, nli = list_class_tasks(both)
    assert (rte.start, rte.stop, nli.start, nli.stop) == (0, 2, 2, 5)
    assert nli.make_target(1).tolist() == [3, 2, 5]
    assert list_class_tasks(DataConfig.model_validate({"train": ["a.jsonl"]})) == []


def test_held_out_sources_find_their_task() -> None:
    rte, nli = list_class_tasks(config(*TWO))
    held = DataSource.model_validate(source("dev.tsv", name="nli"))
    assert find_source_task(held, [rte, nli], "data.eval[0]") is nli
    other = DataSource.model_validate(source("dev.tsv"))
    assert find_source_task(other, [rte], "data.eval[0]") is rte
    with pytest.raises(UserError, match=r"data.eval\[0\]: no .* called dev; .* one of rte, nli"):
        find_source_task(other, [rte, nli], "data.eval[0]")
    swapped = DataSource.model_validate(source("rte.tsv", "no", "yes"))
    with pytest.raises(UserError, match=r"labels are \['no', 'yes'\], but those of task rte"):
        find_source_task(swapped, [rte], "data.eval[0]")


def test_a_positive_label_is_that_of_its_task() -> None:
    nli = source("d/nli.tsv", "a", "b", "c", positive_label="b")
    first, second = list_class_tasks(config(TWO[0], nli))
    assert (first.positive_class, second.positive_class) == (None, 3)
    held = DataSource.model_validate(source("dev.tsv", name="nli", positive_label="c"))
    with pytest.raises(
        UserError, match=r"data.eval\[0\].positive_label is c, but that of task nli"
    ):
        find_source_task(held, [first, second], "data.eval[0]")


def test_two_tasks_of_one_name() -> None:
    with pytest.raises(UserError, match=r"data.train\[1\]: task rte is already defined"):
        list_class_tasks(config(TWO[0], source("e/rte.tsv", "a", "b")))
