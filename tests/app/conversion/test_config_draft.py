"""The commented file: it reads back to the settings, whatever their text is."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile


def test_the_file_reads_back_to_the_settings() -> None:
    draft = ConfigDraft()
    values = {
        "save.dir": "a: b # c",
        "base.path": "cost ${x}",
        "data.chat_template": "{% if a %}\n# no comment\n  b: [\n{% endif %}",
        "data.train": [{"path": "2e-4", "columns": {"text": "null"}}],
        "train.lr": 1e-5,
        "train.betas": [0.9, 0.95],
        "base.quant": None,
        "base.revision": "1_000",
        "resume": "never",
    }
    for key, value in values.items():
        draft.put_setting(key, value, "a key: of # theirs")
    draft.list_unmatched("x", "several\nlines " * 20, "a reason")
    text = draft.format_file("Title")
    tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert tree == draft.build_tree()
    assert next(line for line in text.splitlines() if "# a key: of # theirs" in line).startswith(
        "  "
    )
    assert text.index("base:") < text.index("data:") < text.index("train:") < text.index("save:")
    assert "#   x: several lines several" in text and "... -- a reason" in text


def test_values_of_other_names() -> None:
    draft = ConfigDraft()
    draft.put_known_value("train.optimizer", "optim", "adamw_bnb_8bit", ())
    draft.put_known_value("train.schedule", "lr_scheduler", "Cosine", ("cosine",))
    draft.put_known_value("data.too_long", "excess", "raise", ("drop",))
    draft.put_known_value("adapter.init", "init", "gaussian", ())
    assert {key: setting.value for key, setting in draft.settings.items()} == {
        "train.optimizer": "adamw8bit",
        "train.schedule": "cosine",
        "data.too_long": "error",
    }
    assert draft.unmatched == [
        "init: gaussian -- adapter.init has no such value; its default is kept"
    ]


def test_remaining_keys_follow_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        "base_model: m\nlogging_steps: 5\nplot_loss: true\nmine: 1\nwandb_api_key: abcdefghijk\n"
        "use_own: false\nexclude_modules: [a]\nboring: 1\noutput_dir: o\nbase_model_config: x\n"
        "save_total_limit: 3\n"
    )
    draft, file = ConfigDraft(), ForeignFile(tmp_path / "a.yml")
    draft.put_setting("save.keep", 1, "set before")
    draft.copy_remaining_keys(file, frozenset({"boring"}))
    assert {key: setting.value for key, setting in draft.settings.items()} == {
        "save.keep": 1,
        "base.path": "m",
        "train.log_every": 5,
        "save.dir": "o",
    }
    assert draft.needless == ["plot_loss", "boring", "base_model_config"]
    assert [line.split(" -- ")[0] for line in draft.unmatched] == [
        "mine: 1",
        "wandb_api_key: ***",
        "exclude_modules: ['a']",
        "save_total_limit: 3",
    ]
    assert file.list_names() == []
