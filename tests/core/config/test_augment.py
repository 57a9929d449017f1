"""Wrong values of ``data.train[].augment``, and the permission for functions."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_peft.core.config.io import dump_config, load_config, parse_config
from dist_peft.core.errors import UserError

FUNCTION = {"kind": "function", "function": "package.module:name"}


def make_tree(augment: object, **data: Any) -> dict[str, Any]:
    source = {"path": "a.jsonl", "augment": augment}
    return {"base": {"path": "b"}, "data": {"train": [source], **data}}


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"kind": "eda", "synonyms": "s", "alpha_sr": 1.1}, "alpha_sr: Input should be less than"),
        ({"kind": "eda", "synonyms": "s", "p_rd": -0.1}, "p_rd: Input should be greater than"),
        ({"kind": "eda", "synonyms": "s", "num_aug": 0}, "num_aug: Input should be greater than"),
        ({"kind": "eda"}, "synonyms is missing: give a file with lines such as"),
        ({"kind": "eda", "alpha_sr": 0, "alpha_ri": 0, "alpha_rs": 0, "p_rd": 0}, "are all 0"),
        ({"kind": "eda", "synonyms": "s", "alpha": 1}, "unknown key data.train.0.augment.alpha"),
        ({"kind": "token_dropout", "p": 1}, "p: Input should be less than 1"),
        ({"kind": "token_dropout", "fields": []}, "fields: List should have at least 1 item"),
        ({"kind": "function", "function": "name"}, "function: String should match pattern"),
        ({"kind": "backtranslation"}, "augment: Input tag 'backtranslation' found using 'kind'"),
        ({"p": 0.1}, "augment: Unable to extract tag using discriminator 'kind'"),
    ],
)
def test_wrong_values_are_refused_by_key(augment: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(make_tree(augment))
    assert message in str(caught.value) and "data.train.0.augment" in str(caught.value)


def test_held_out_sources_are_refused() -> None:
    tree = make_tree(None, eval=[{"path": "e", "augment": {"kind": "token_dropout"}}])
    with pytest.raises(UserError, match=r"eval\[0\]\.augment: held-out records are measured as"):
        parse_config(tree)


def test_configuration_file_cannot_allow_code(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(make_tree(FUNCTION, allow_code=True)))
    with pytest.raises(
        UserError, match=r"sets data\.allow_code, .*command line: data\.allow_code="
    ):
        load_config(file)
    config = load_config(file, ["data.allow_code=true"])
    assert config.data.allow_code
    file.write_text(dump_config(config))
    assert not load_config(file).data.allow_code  # a run's own file says nothing of it
