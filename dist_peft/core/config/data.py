"""The ``data`` section of a run description: sources, mixing, packing into sequences."""

from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.augment import AugmentConfig
from dist_peft.core.config.types import ConfigSection, Float, Int, Label, PathText, SourcePath

__all__ = ["DataConfig", "DataSource"]


class DataSource(ConfigSection):
    """One file, glob, directory or hub data set, and the format of its records."""

    path: SourcePath = Field(
        description="File (.jsonl .json .parquet .arrow .csv .tsv .txt; text also .gz .zst), glob, "
        "directory (also one of save_to_disk), or hub id."
    )
    format: Literal["auto", "completion", "alpaca", "chat", "text", "classification"] = Field(
        "auto",
        description="auto: detected from the columns. classification: for base.head classifier; "
        "needs labels.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Role -> column of the file, such as {prompt: question, completion: answer}.",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="Columns to leave out although they mean something (label, weight, images, "
        "...), which is refused otherwise.",
    )
    template: str | None = Field(
        None, description="Prompt text with {column} fields, for completion and alpaca."
    )
    labels: list[Label] = Field(
        default_factory=list,
        description="Classification: values of the label column, in the order of their class ids; "
        "of a held-out source by default those of its task.",
    )
    positive_label: Label | None = Field(
        None,
        description="Classification: the label, one of labels, whose F1 is reported (GLUE's MRPC "
        "and QQP: 1).",
    )
    column_names: list[str] = Field(
        default_factory=list,
        description="Names of the columns of .csv and .tsv files without a header line (CoLA of "
        "GLUE: [source, label, mark, sentence]).",
    )
    domain: Label | None = Field(
        None,
        description="Training, with train.domain_adversarial: the domain of the texts. A source "
        "with a domain and without labels has no label column, and trains the discriminator only.",
    )
    split: str = Field("train", description="Split of a hub or saved data set.")
    limit: Int | None = Field(None, ge=1, description="Use only the first N records.")
    name: str | None = Field(
        None, description="Of the task, in losses by task; default: the file's name."
    )
    weight: Float = Field(
        1.0, gt=0, description="With data.mixing weights: share of the sequences."
    )
    from_step: Int = Field(
        0, ge=0, description="With data.mixing: the first step (from 0) that may draw from it."
    )
    to_step: Int | None = Field(
        None, ge=1, description="With data.mixing: the step before which it ends; default: never."
    )

    augment: AugmentConfig | None = Field(
        None, description="Variants of each record (eda, token_dropout, function); train only."
    )

    @property
    def num_variants(self) -> int:
        """Return the number of documents of a record: 1, and those of ``augment``."""
        return 1 if self.augment is None else 1 + self.augment.num_aug

    def without_variants(self) -> Self:
        """Return this source with its records as they are."""
        return self.model_copy(update={"augment": None})

    @property
    def task_name(self) -> str:
        """Return ``name``, or the last part of ``path``."""
        return self.name or PurePath(self.path).stem or self.path

    @model_validator(mode="after")
    def _check_data_source(self) -> Self:
        if self.to_step is not None and self.to_step <= self.from_step:
            raise ValueError(f"to_step {self.to_step} is not after from_step {self.from_step}")
        if self.labels and self.format != "classification":
            raise ValueError(f"labels are for format: classification, not {self.format}")
        if self.positive_label is not None and self.format != "classification":
            raise ValueError("positive_label is for format: classification")
        if self.labels and self.positive_label not in (None, *self.labels):
            raise ValueError(
                f"positive_label {self.positive_label} is not one of labels {self.labels}"
            )
        if len(set(self.column_names)) < len(self.column_names):
            raise ValueError(f"column_names {self.column_names} has a name twice")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(f"labels must be at least two different values, not {self.labels}")
        return self


def read_bare_paths(entries: Any) -> Any:
    """Read a source as a list of one, and each bare string of a list as ``{path: string}``."""
    if isinstance(entries, str | dict):
        entries = [entries]
    if isinstance(entries, list):
        return [{"path": e} if isinstance(e, str) else e for e in entries]
    return entries


class DataConfig(ConfigSection):
    """Training and held-out data, and how records become token sequences."""

    train: list[DataSource] = Field(
        min_length=1, description="Training sources: paths or DataSource."
    )
    eval: list[DataSource] = Field(
        default_factory=list,
        description="Held-out sources. With several, the loss of each is reported too.",
    )
    val_split: Float = Field(
        0.0,
        ge=0,
        lt=2**31,
        description="Instead of eval: hold out a part of the records of each training source, a "
        "share below 1, else a number of records. Equal records are on one side.",
    )
    mixing: Literal["joined", "sizes", "weights"] = Field(
        "joined",
        description="joined: records of all training sources are one pool. Else each sequence is "
        "drawn from one source, by its sequences ** (1 / temperature) or by its weight.",
    )
    temperature: Float = Field(
        1.0,
        gt=0,
        description="With mixing sizes: 1: by the sources' sizes; large: equal shares.",
    )
    seq_len: Int = Field(2048, ge=8, le=2**26, description="Tokens in a sequence.")
    packing: bool = Field(
        True, description="Several documents a sequence, isolated from each other."
    )
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="completion: assistant turns or completion only; all: each token."
    )
    too_long: Literal["error", "truncate", "drop", "split"] = Field(
        "error",
        description="A record longer than seq_len: refuse, cut, leave out, or (text) split.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat template in place of the tokenizer's: Jinja text, or a file of it. It is "
        "saved with the adapter.",
    )
    turn_end: Literal["error", "warn"] = Field(
        "error",
        description="An assistant turn without an end token, so that the model would not learn to "
        "stop: refuse, or train anyway.",
    )
    cache_dir: PathText | None = Field(
        None, description="Token cache; default ~/.cache/dist_peft or $DIST_PEFT_CACHE."
    )
    allow_code: bool = Field(
        False,
        description="Run the functions that train[].augment names; only as an override on the "
        "command line.",
    )
    workers: Int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Processes that tokenize a large source; 1: none but the run's own. Default: "
        "the cores that the run may use, at most 16.",
    )

    @model_validator(mode="before")
    @classmethod
    def _parse_bare_paths(cls, value: Any) -> Any:
        """Read a bare string in ``train`` or ``eval`` as ``{path: string}``."""
        if isinstance(value, dict):
            value = dict(value)
            for key in ("train", "eval"):
                if value.get(key) is not None:
                    value[key] = read_bare_paths(value[key])
            train = value.get("train")
            if isinstance(train, list) and any(
                _read_format_name(e) == "classification" for e in train
            ):
                value.setdefault("packing", False)
        return value

    @property
    def labelled(self) -> list[DataSource]:
        """Training sources with labels."""
        return [source for source in self.train if source.labels]

    @property
    def is_classification(self) -> bool:
        """Whether records are classified instead of predicted token by token."""
        return self.train[0].format == "classification"

    @property
    def held_out(self) -> list[DataSource]:
        """Held-out sources: ``eval``, or with ``val_split`` the training sources, of which a part
        is held out (``data.held_out_split``)."""
        return self.train if self.val_split else self.eval

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.val_split and self.eval:
            raise ValueError(
                "val_split splits held-out records off train, and eval names held-out files: give "
                "one of them"
            )
        if self.val_split > 1 and self.val_split != int(self.val_split):
            raise ValueError(
                f"val_split {self.val_split} is neither a share below 1 nor a number of records"
            )
        return self

    @model_validator(mode="after")
    def _check_classification(self) -> Self:
        formats = {(s.format == "classification") for s in [*self.train, *self.eval]}
        if len(formats) > 1:
            raise ValueError("either all sources have format: classification or none")
        if self.is_classification and self.packing:
            raise ValueError(
                "packing: true is not for classification, whose rows hold one record each; leave "
                "it out"
            )
        for number, source in enumerate(self.train):
            if self.is_classification and not source.labels and source.domain is None:
                raise ValueError(
                    f"train[{number}].labels is missing: give the values of the label column, such "
                    "as [negative, positive]"
                )
        return self

    @model_validator(mode="after")
    def _check_augmentation(self) -> Self:
        for number, source in enumerate(self.eval):
            if source.augment is not None:
                raise ValueError(
                    f"eval[{number}].augment: held-out records are measured as they are; leave it "
                    "out (data.train[].augment is for training sources)"
                )
        return self

    @model_validator(mode="after")
    def _check_mixing(self) -> Self:
        mixed = {"weight": ("weights",), "from_step": ("sizes", "weights")}
        mixed["to_step"] = mixed["from_step"]
        for number, source in enumerate(self.train):
            for key, modes in mixed.items():
                default = DataSource.model_fields[key].default
                if getattr(source, key) != default and self.mixing not in modes:
                    raise ValueError(
                        f"train[{number}].{key} needs mixing: {' or '.join(modes)}, "
                        f"not {self.mixing}"
                    )
        if self.temperature != 1 and self.mixing != "sizes":
            raise ValueError(f"temperature needs mixing: sizes, not {self.mixing}")
        for key in ("train", "eval"):
            names = [s.name for s in getattr(self, key) if s.name is not None]
            if len(set(names)) < len(names):
                raise ValueError(f"two sources of {key} have the same name")
        return self


def _read_format_name(entry: Any) -> Any:
    return entry.get("format") if isinstance(entry, dict) else getattr(entry, "format", None)
