"""Classes of a classifier: the labels of the training sources, one task each.

One logit matrix serves all tasks; each has its range of class ids, in the order of the sources::

    data.train[0]  rte    labels [entailment, not_entailment]   ids 0 1
    data.train[1]  mrpc   labels ["0", "1"]                     ids     2 3

A sequence belongs to one task, and its softmax runs over that task's range alone. Held-out sources
belong to the training task of the same name; with a single training task all of them do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_peft.core.config.run import DataConfig, DataSource
from dist_peft.core.errors import UserError

__all__ = [
    "ClassTask",
    "apply_task_labels",
    "find_source_task",
    "list_class_names",
    "list_class_tasks",
    "list_domains",
]


@dataclass(frozen=True)
class ClassTask:
    """One classification task.

    Attributes:
        name: name of the training source.
        labels: values of the label column, in the order of their ids.
        start: its first class id.
        positive_label: the label whose F1 is reported, if any.
    """

    name: str
    labels: tuple[str, ...]
    start: int
    positive_label: str | None = None

    @property
    def stop(self) -> int:
        """One after its last class id."""
        return self.start + len(self.labels)

    @property
    def positive_class(self) -> int | None:
        """Class id of ``positive_label``."""
        if self.positive_label is None:
            return None
        return self.start + self.labels.index(self.positive_label)

    def make_target(self, label: int) -> torch.Tensor:
        """Return class id and range as LongTensor [3]; ``label`` is an index into ``labels``."""
        return torch.tensor([self.start + label, self.start, self.stop])


def list_class_tasks(config: DataConfig) -> list[ClassTask]:
    """Return the tasks of the labelled training sources, in their order.

    Raises:
        UserError: two of them have the same name.
    """
    tasks: list[ClassTask] = []
    for number, source in enumerate(config.train):
        if source.format != "classification" or not source.labels:
            continue
        if source.task_name in [task.name for task in tasks]:
            raise UserError(
                f"data.train[{number}]: task {source.task_name} is already defined; give "
                "each source a "
                "name, or name the files of one task by a pattern in one path"
            )
        start = tasks[-1].stop if tasks else 0
        labels = tuple(source.labels)
        tasks.append(ClassTask(source.task_name, labels, start, source.positive_label))
    return tasks


def list_domains(config: DataConfig) -> list[str]:
    """Return the domains of the training sources, by id, in the order of the sources."""
    return list(dict.fromkeys(s.domain for s in config.train if s.domain is not None))


def list_class_names(config: DataConfig) -> list[str]:
    """Return the names of all classes, by id: the label, with several tasks ``task/label``."""
    tasks = list_class_tasks(config)
    prefixes = [f"{task.name}/" if len(tasks) > 1 else "" for task in tasks]
    return [p + label for p, task in zip(prefixes, tasks, strict=True) for label in task.labels]


def find_source_task(source: DataSource, tasks: Sequence[ClassTask], key: str) -> ClassTask:
    """Return the task that a training or held-out source belongs to.

    Args:
        key: configuration key of the source, such as ``data.eval[0]``.

    Raises:
        UserError: no task of its name among several, or its labels differ from the task's.
    """
    named = [task for task in tasks if task.name == source.task_name]
    if not named and len(tasks) > 1:
        raise UserError(
            f"{key}: no training task is called {source.task_name}; set {key}.name to one of "
            f"{', '.join(task.name for task in tasks)}"
        )
    task = named[0] if named else tasks[0]
    if source.labels and tuple(source.labels) != task.labels:
        raise UserError(
            f"{key}.labels are {source.labels}, but those of task {task.name} are "
            f"{list(task.labels)}; leave {key}.labels out"
        )
    if source.positive_label not in (None, task.positive_label):
        raise UserError(
            f"{key}.positive_label is {source.positive_label}, but that of task {task.name} is "
            f"{task.positive_label or 'not set'}; set it in the training source"
        )
    return task


def apply_task_labels(
    source: DataSource, tasks: Sequence[ClassTask], key: str
) -> tuple[DataSource, ClassTask | None]:
    """Return ``source`` with the labels of its task, and the task; None for one without labels.

    Raises:
        UserError: no task of its name among several, or its labels differ from the task's.
    """
    if not source.labels and source.domain is not None:
        return source, None
    task = find_source_task(source, tasks, key)
    return source.model_copy(update={"labels": list(task.labels)}), task
