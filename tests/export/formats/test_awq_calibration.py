"""Groups of a block, and factors that leave the model's function as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from dist_peft.core.errors import UserError
from dist_peft.export.formats.awq_calibration import read_calibration_tokens, search_model_factors
from dist_peft.export.formats.registry import export_model
from dist_peft.quant.affine import AffineCodec
from tests.support.export_runs import TEXT, FakeRun, llama, make_run

CODEC = AffineCodec(4, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_run(tmp_path_factory.mktemp("awq"), None)


def write_text(directory: Path) -> Path:
    (directory / "text.txt").write_text(TEXT * 40)
    return directory / "text.txt"


def list_groups(paths: Any) -> set[str]:
    return {path.partition("layers.0.")[2] for path in paths if "layers.0." in path}


def test_the_scaled_model_computes_the_same(run: FakeRun, tmp_path: Path) -> None:
    job = run.job(tmp_path)
    found = search_model_factors(job, run.directory, write_text(tmp_path), CODEC)
    assert len(found.errors) == 6 and all(error <= plain for error, plain in found.errors)
    assert list_groups(found.columns) == {
        f"{name}.weight"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert any(not torch.equal(f, torch.ones_like(f)) for f in found.columns.values())
    model = tf.AutoModelForCausalLM.from_pretrained(run.directory).eval()
    with torch.no_grad():
        before = model(input_ids=run.probe.input_ids).logits
        for name, parameter in model.named_parameters():
            parameter.copy_(found.scale_rows(name, parameter, 0))
        after = model(input_ids=run.probe.input_ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_rows_are_scaled_from_any_first_row(run: FakeRun, tmp_path: Path) -> None:
    found = search_model_factors(run.job(tmp_path), run.directory, write_text(tmp_path), CODEC)
    name = "model.layers.1.mlp.up_proj.weight"
    rows = load_file(run.directory / "model.safetensors")[name]
    whole = found.scale_rows(name, rows, 0)
    assert torch.equal(found.scale_rows(name, rows[32:], 32), whole[32:])
    assert found.scale_rows("model.norm.weight", rows, 0) is rows


def test_values_of_as_many_heads_take_factors_of_the_output(tmp_path: Path) -> None:
    config = llama(num_key_value_heads=4, attention_bias=True)
    run = make_run(tmp_path, None, config=config)
    found = search_model_factors(run.job(tmp_path), run.directory, write_text(tmp_path), CODEC)
    assert "self_attn.o_proj.weight" in list_groups(found.columns)
    assert {"self_attn.v_proj.weight", "self_attn.v_proj.bias"} <= list_groups(found.rows)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        # the norm multiplies by 1 + weight: the products of the MLP remain
        (tf.GemmaConfig(**llama(head_dim=16).to_dict() | {"model_type": "gemma"}), {"mlp.up_proj"}),
        # attention and MLP read the same norm
        (tf.CohereConfig(**llama().to_dict() | {"model_type": "cohere"}), {"mlp.up_proj"}),
    ],
    ids=["gemma", "cohere"],
)
def test_other_blocks_have_fewer_groups(
    config: tf.PretrainedConfig, groups: set[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path, None, config=config)
    found = search_model_factors(run.job(tmp_path), run.directory, write_text(tmp_path), CODEC)
    assert {path.rpartition(".")[0] for path in list_groups(found.rows)} == groups


def test_bad_texts(run: FakeRun, tmp_path: Path) -> None:
    job, short, other = run.job(tmp_path), tmp_path / "short.txt", tmp_path / "other.jsonl"
    short.write_text("the quick")
    other.write_text('{"words": "a"}\n')
    with pytest.raises(UserError, match="less than one sequence of 64; give a longer text"):
        read_calibration_tokens(short, job, 64)
    for file in (other, tmp_path / "absent.txt"):
        with pytest.raises(UserError, match=f"--calibration .*{file.name} cannot be read"):
            read_calibration_tokens(file, job, 64)


def test_lines_of_json_are_their_texts(run: FakeRun, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "' + TEXT.strip() + '"}\n' * 1 + ('{"text": "' + TEXT + '"}\n') * 20)
    ids = read_calibration_tokens(file, run.job(tmp_path), 16)
    assert ids.shape == (16, 16)
    tokenizer = tf.AutoTokenizer.from_pretrained(run.directory)
    expected = tokenizer(TEXT.strip(), add_special_tokens=False).input_ids[:16]
    assert ids[0].tolist() == expected


def test_export_has_smaller_errors_of_products(run: FakeRun, tmp_path: Path) -> None:
    """Norms are written with the divisors, and nothing temporary stays."""
    job = run.job(tmp_path / "out", group_size=32, calibration=write_text(tmp_path))
    exported = export_model("awq", job)
    assert "AWQ's factors" in exported.how and exported.written.packed == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors[name], load_file(run.directory / "model.safetensors")[name])
