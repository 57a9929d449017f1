"""Messages about unknown keys and wrong values: habits of other trainers, places, spelling."""

from pathlib import Path

import pytest

from dist_peft.core.config.io import load_config
from dist_peft.core.config.run import RunConfig
from dist_peft.core.config.validation_messages import list_config_keys, list_section_classes
from dist_peft.core.errors import UserError

LEAST = "base: {path: model}\ndata: {train: [a.jsonl]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(LEAST)
    return tmp_path / "run.yaml"


def _refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("logging_steps", "here it is train.log_every"),
        ("eval_steps", "here it is train.eval_every"),
        ("save_steps", "here it is save.every"),
        ("lora_r", "here it is adapter.r"),
        ("exclude_modules", "no key here: adapter.target_modules lists the linears that are"),
        ("init_lora_weights", "here it is adapter.init (true is default)"),
        ("chat_template", "here it is data.chat_template (Jinja text or a file of it"),
        ("val_set_size", "here it is data.val_split (a share of the records"),
        ("learning_rate", "here it is train.lr"),
        ("per_device_train_batch_size", "here it is train.micro_batch"),
        ("gradient_accumulation_steps", "here it is train.global_batch (sequences of a whole st"),
        ("load_in_4bit", "here it is base.quant: {kind: nf4}"),
        ("bf16", "here it is base.compute_dtype: bfloat16"),
        ("output_dir", "here it is save.dir"),
        ("report_to", "here it is save.track (a list of wandb, mlflow and trackio"),
        ("wandb_project", "no key here: the tracker reads it from its environment"),
        ("sample_packing", "here it is data.packing"),
        ("train_on_inputs", "here it is data.loss_on: all"),
        ("streaming", "no key here: files are read piece by piece"),
    ],
)
def test_keys_of_other_trainers_at_any_nesting(file: Path, name: str, words: str) -> None:
    for place in ("", "train.", "adapter.", "save.", "base.quant.", "train.domain_adversarial."):
        assert f"unknown key {place}{name}; {words}" in _refusal(file, f"{place}{name}=1")
    text = f"{LEAST}{name}: 1\n"
    file.write_text(text)
    assert f"unknown key {name}; {words}" in _refusal(file)
    file.write_text(LEAST.replace("train: [a.jsonl]", f"train: [{{path: a, {name}: 1}}]"))
    assert f"unknown key data.train.0.{name}; {words}" in _refusal(file)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.packing=true", "unknown key train.packing; here it is data.packing"),
        ("adapter.lr=1", "unknown key adapter.lr; here it is train.lr"),
        ("seq_len=1", "unknown key seq_len; here it is data.seq_len"),
        ("seqlen=1", "unknown key seqlen; did you mean data.seq_len?"),
        ("train.step=1", "unknown key train.step; did you mean steps?"),
        ("train.stage=1", "unknown key train.stage; here it is engine.stage"),
        ("data.projection=1", "unknown key data.projection; here it is adapter.projection"),
        ("save.init_from=1", "unknown key save.init_from; here it is adapter.init_from"),
        ("engine.name=1", "unknown key engine.name; here it is "),
        ("lora={r: 8}", "unknown key lora; here it is adapter"),
    ],
)
def test_keys_of_other_sections(file: Path, override: str, words: str) -> None:
    assert words in _refusal(file, override)


def test_options_of_another_kind_of_adapter(file: Path) -> None:
    message = _refusal(file, "adapter.r=8", "adapter.kind=prefix")
    assert message == (
        "unknown key adapter.r; it is for kind lora, qalora, vera, loha, lokr; "
        "adapter={kind: prefix} on the command line replaces the whole section"
    )
    assert load_config(file, ["adapter.r=8", "adapter={kind: prefix}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.quant=nf4", "key base.quant: write base.quant: {kind: nf4} (given: 'nf4')"),
        ("base.quant=none", "key base.quant: write base.quant: null (given: 'none')"),
        ("base.quant=false", "key base.quant: write base.quant: null (given: False)"),
        ("base.quant=7", "key base.quant must be a section, of keys such as bits"),
        ("base.compute_dtype=bf16", "write base.compute_dtype: bfloat16 (given: 'bf16')"),
        ("adapter.kind=qlora", "key adapter.kind: write adapter.kind: lora and base.quant: {kind"),
        ("adapter.kind=oft", "key adapter.kind: there is no such value here (given: 'oft')"),
        ("train.optimizer=paged_adamw_8bit", "write train.optimizer: paged_adamw8bit"),
        ("engine.kind=zero3", "write engine.kind: zero and engine.stage: 3 (given: 'zero3')"),
        ("adapter.target_modules=q_proj", "it is a list: write adapter.target_modules: [q_proj]"),
        ("adapter.target_modules='q, v'", "it is a list: write adapter.target_modules: [q, v]"),
        ("adapter.target_modules=all", "write adapter.target_modules: all-linear"),
    ],
)
def test_values_of_other_trainers(file: Path, override: str, words: str) -> None:
    message = _refusal(file, override)
    assert words in message and message.count("key ") == 1


def test_keys_are_listed_with_their_kinds() -> None:
    keys = list_config_keys()
    assert keys["train.lr"] == () and keys["data.train[].path"] == ()
    assert keys["adapter.projection"] == ("prefix",)
    assert keys["adapter.num_virtual_tokens"] == ("prompt", "ptuning", "prefix")
    assert set(RunConfig.model_fields) <= set(keys)


def test_section_classes_of_annotations() -> None:
    names = [m.__name__ for m in list_section_classes(RunConfig.model_fields["adapter"].annotation)]
    assert names[0] == "LoraConfig" and len(names) == 15
    assert list_section_classes(int) == [] == list_section_classes(list[str])
