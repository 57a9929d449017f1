import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dist_peft.core.config.io import dump_config, load_config, parse_config
from dist_peft.core.config.run import (
    LoraConfig,
    PrefixConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dist_peft.core.errors import UserError

LEAST = "base: {path: model}\ndata: {train: [a.jsonl]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(LEAST)
    return tmp_path / "run.yaml"


def _load(file: Path, text: str, *overrides: str) -> RunConfig:
    file.write_text(text)
    return load_config(file, overrides)


def _refusal(file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        _load(file, text, *overrides)
    return str(caught.value)


# -- unknown and missing keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {steps: 3}", "unknown key trian; did you mean train?"),
        ("xyzzy: 3", "unknown key xyzzy; known here: adapter, base, data, engine, resume, save"),
        ("train: {step: 3}", "unknown key train.step; did you mean steps?"),
        ("engine: {int: 3}", "unknown key engine.int; known here: activation_checkpointing, "),
        ("adapter: {kind: lora, rr: 8}", "unknown key adapter.rr; did you mean r?"),
        ("adapter: {alhpa: 8}", "unknown key adapter.alhpa; did you mean alpha?"),
        (
            "adapter: {kind: none, alpha: 8}",
            "unknown key adapter.alpha; it is for kind lora, qalora, loha, lokr, adalora; "
            "adapter={kind: none} on the command line replaces the whole section",
        ),
        ("train: {1: x}", "key train.1: Keys should be strings"),
    ],
)
def test_unknown_keys_name_the_nearest(file: Path, text: str, words: str) -> None:
    message = _refusal(file, LEAST + text)
    assert message.startswith(f"{file}: ")
    assert words in message


def test_unknown_keys_deep_inside(file: Path) -> None:
    message = _refusal(
        file,
        """
base: {path: m, quant: {kind: int, grup_size: 32}}
data:
  train: [a.jsonl, {path: b, fromat: chat}]
  eval: {path: c, colums: {a: b}}
""",
    )
    assert "unknown key base.quant.grup_size; did you mean group_size?" in message
    assert "unknown key data.train.1.fromat; did you mean format?" in message
    assert "unknown key data.eval.0.colums; did you mean columns?" in message


def test_missing_keys(file: Path) -> None:
    assert _refusal(file, "") == f"{file}: key base is required; key data is required"
    message = _refusal(file, "base: {}\ndata: {train: [{format: chat}]}")
    assert "key base.path is required; key data.train.0.path is required" in message


# -- wrong types -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: ten}", "key train.steps: Input should be a valid integer"),
        ("train: {steps: ten}", "(given: 'ten')"),
        ("train: {steps: 2.5}", "key train.steps: Input should be a valid integer"),
        ("train: 3", "key train must be a section, of keys such as betas, "),
        ("train:", "(given: nothing)"),
        ("train: [3]", "(given: a list)"),
        ("adapter: null", "key adapter must be a section, of keys such as "),
        ("adapter: {target_modules: []}", "key adapter.target_modules: List should have at least"),
        ("train: {seed: 99999999999999999999}", "key train.seed: Input should be less than"),
        (
            "adapter: {target_modules: 5}",
            "key adapter.target_modules: Input should be a valid list",
        ),
        ("adapter: {target_modules: [5]}", "key adapter.target_modules.0: Input should be a valid"),
        ("adapter: {rank_pattern: {none: x}}", "key adapter.rank_pattern.none: "),
        ("save: {dir: [a]}", "key save.dir: Input should be a valid string"),
        ("train: {lr: true}", "key train.lr: expected a number, got a boolean (given: True)"),
        ("train: {steps: yes}", "key train.steps: expected a number, got a boolean"),
        ("train: {betas: [false, 0.9]}", "key train.betas.0: expected a number, got a boolean"),
        ("adapter: {rank_pattern: {a: on}}", "key adapter.rank_pattern.a: expected a number"),
        ("engine: {shard_group: true}", "key engine.shard_group: expected a number, got a boolean"),
    ],
)
def test_wrong_types_name_key_and_value(file: Path, text: str, words: str) -> None:
    assert words in _refusal(file, LEAST + text)


def test_the_tree_itself_may_be_wrong() -> None:
    for tree in (3, None, "base", ["base"]):
        with pytest.raises(UserError, match="config: key config must be a section, of keys such"):
            parse_config(tree)


# -- files -----------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(UserError, match=f"config file {path} {what}; give --config"):
            load_config(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"base: [1", "is not valid YAML"),
        (b"base: 1\nbase: 2", "is not valid YAML: .*duplicate key base"),
        (b"a: \xff", "is not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        (b"- a\n- b", "must hold sections such as base: and data:"),
        (b"3", "must hold sections"),
        (b"a: " + b"[" * 3000, "nested too deeply|not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)config file {file} {words}"):
        load_config(file)


# -- overrides -------------------------------------------------------------------------------------


def test_overrides(file: Path) -> None:
    config = load_config(
        file,
        [
            "train.lr=2e-4",
            "train.betas=[0.8,0.95]",
            "train.steps=7",
            "train.steps=8",
            "base.quant=null",
            "save.dir='a b=c'",
            'resume="never"',
            "adapter.r=4",
            "adapter.target_modules=[q_proj,v_proj]",
            "data.train=[b.jsonl,{path: c.csv}]",
            "data.cache_dir=",
        ],
    )
    assert config.train.lr == 2e-4
    assert config.train.betas == (0.8, 0.95)
    assert config.train.steps == 8
    assert config.base.quant is None
    assert config.save.dir == "a b=c"
    assert config.resume == "never"
    assert getattr(config.adapter, "r", None) == 4
    assert getattr(config.adapter, "target_modules", None) == ["q_proj", "v_proj"]
    assert [source.path for source in config.data.train] == ["b.jsonl", "c.csv"]
    assert config.data.cache_dir is None  # nothing is null in YAML


def test_numbers_as_yaml_1_2_writes_them(file: Path) -> None:
    assert _load(file, LEAST + "train: {lr: 2e-4, eps: 1E-8}").train.lr == 2e-4


def test_braces_replace_a_whole_section(file: Path) -> None:
    text = LEAST + "adapter: {r: 4, alpha: 8}\ntrain: {lr: 1e-3, steps: 9}"
    prefix = _load(
        file, text, "adapter={kind: prefix, num_virtual_tokens: 7}", "adapter.dropout=.1"
    )
    assert prefix.adapter == PrefixConfig(num_virtual_tokens=7, dropout=0.1)
    assert prefix.train.steps == 9  # other sections stay
    assert _load(file, text, "adapter={}").adapter == LoraConfig()
    assert _load(file, text, "adapter.r=5").adapter == LoraConfig(r=5, alpha=8)
    train = _load(file, text, "train={steps: 3}").train
    assert (train.steps, train.lr) == (3, TrainConfig().lr)
    quant = _load(file, LEAST, "base.quant.bits=3", "base.quant={kind: int}").base.quant
    assert quant == QuantConfig(kind="int")


def test_a_section_set_to_null_and_filled_again(file: Path) -> None:
    config = load_config(file, ["base.quant=null", "base.quant.kind=int", "base.quant.bits=3"])
    assert config.base.quant == QuantConfig(kind="int", bits=3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "override 'train.steps' is not of the form key.sub=value"),
        ("--config=x", "override '--config=x' is not of the form key.sub=value"),
        ("=3", "override '=3' is not of the form key.sub=value"),
        ("train..steps=3", "override 'train..steps=3' is not of the form key.sub=value"),
        ("train.steps=[1", "override 'train.steps=[1' cannot be read"),
        ("data.train.0.path=x", "a list is replaced as a whole, such as data.train=[a.jsonl]"),
        ("data.train.0={path: x}", "a list is replaced as a whole, such as data.train=[a.jsonl]"),
        ("data.train.x={path: x}", "a list is replaced as a whole, such as data.train=[a.jsonl]"),
        ("adapter={kind: [", "override 'adapter={kind: [' cannot be read"),
        ("train.step=3", "unknown key train.step; did you mean steps?"),
        ("train=3", "key train must be a section, of keys such as betas, "),
        ("base.path=3", "key base.path: Input should be a valid string (given: 3)"),
    ],
)
def test_overrides_that_are_refused(file: Path, override: str, words: str) -> None:
    assert words in _refusal(file, LEAST, override)


# -- references ------------------------------------------------------------------------------------


def test_references_to_other_keys(file: Path) -> None:
    config = _load(file, LEAST + "save: {dir: 'runs/${base.path}'}")
    assert config.save.dir == "runs/model"


@pytest.mark.parametrize("template", ["cost ${amount}", "cost ${a b}"])
def test_a_reference_to_nothing_shows_how_to_escape(file: Path, template: str) -> None:
    text = f"base: {{path: m}}\ndata: {{train: [{{path: a, template: '{template}'}}]}}"
    message = _refusal(file, text)
    assert f"config file {file}, with its overrides, has a wrong ${{...}} reference" in message
    assert message.endswith("write \\${ for a literal ${")
    config = _load(file, text.replace("$", "\\$"))
    assert config.data.train[0].template == template


# -- round trip ------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ["${a}", "\\${a}", "\\\\${", "a\\", "$", "2e-4", "null", "yes", "???", "1:30", "a\nb", "#x", ""]
)


def _values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type; what its bounds refuse is filtered by the caller."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _trees(annotation)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is typing.Annotated:
        return _values(arguments[0])
    if origin is list:
        return st.lists(_values(arguments[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(texts, _values(arguments[1]), max_size=2)
    if origin is tuple:
        return st.tuples(*map(_values, arguments)).map(list)
    if arguments:  # a union
        return st.one_of(*map(_values, arguments))
    plain = {
        str: texts,
        bool: st.booleans(),
        int: st.integers(1, 10**6),
        float: st.floats(1e-9, 0.99),
        type(None): st.none(),
    }
    return plain[annotation]


def _trees(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: _values(info.annotation) for name, info in model.model_fields.items()}
    required = {name for name, info in model.model_fields.items() if info.is_required()}
    if "kind" in fields:  # the tag of a union
        required.add("kind")
    return st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: fields[name] for name in fields.keys() - required},
    )


@cache
def _sections(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Trees of a whole run whose section ``name`` is drawn; made once, not for each example."""
    least: dict[str, Any] = {"base": {"path": "m"}, "data": {"train": ["a"]}}

    def build_tree(value: Any) -> dict[str, Any]:
        if name == "adapter" and not value.get("through_quantizer"):
            value.pop("through_zeros", None)  # few draws would pass otherwise
        return {**least, name: value}

    return _values(SECTIONS[name]).map(build_tree).filter(_is_valid)


def _is_valid(tree: dict[str, Any]) -> bool:
    try:
        parse_config(tree)
    except UserError:
        return False
    return True


SECTIONS = {name: info.annotation for name, info in RunConfig.model_fields.items()}


@pytest.mark.parametrize("section", sorted(SECTIONS))
# fields are drawn alone, and few draws pass the rules between them
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_what_is_dumped_loads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, section: str, data: st.DataObject
) -> None:
    config = parse_config(data.draw(_sections(section)))
    file = tmp_path_factory.getbasetemp() / f"{section}.yaml"
    dumped = dump_config(config)
    file.write_text(dumped, newline="")
    again = load_config(file)
    # a written configuration gives no permission to run code
    trust = {
        "base": config.base.model_copy(update={"trust_remote_code": False}),
        "data": config.data.model_copy(update={"allow_code": False}),
    }
    assert again == config.model_copy(update=trust)
    assert dump_config(again) == dumped
