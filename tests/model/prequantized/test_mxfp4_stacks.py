"""gpt-oss in MXFP4 against transformers: weights, logits, who reads which bytes, refusals."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.quant.mxfp4 import Mxfp4Codec
from dist_peft.store.reader import RowReader
from tests.support import packed
from tests.support.packed_floats import GPT_OSS, save_mxfp4, save_tokenized
from tests.support.prequantized_models import base_of, load, logits


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("oss")
    return save_mxfp4(save_tokenized(GPT_OSS, root / "plain"), root / "mxfp4")


def stacks(skeleton: Skeleton) -> dict[str, ExpertStack]:
    return {n: m for n, m in skeleton.model.named_modules() if isinstance(m, ExpertStack)}


def test_weights_and_logits_are_those_of_transformers(directory: Path) -> None:
    skeleton = load(directory)
    files = load_file(directory / "model.safetensors")
    found = stacks(skeleton)
    assert len(found) == 4
    for name, stack in found.items():
        assert stack.codec == Mxfp4Codec() and stack.is_transposed
        wanted = convert_moe_packed_tensors(
            files[f"{name}_blocks"], files[f"{name}_scales"], dtype=torch.float32
        )
        decoded = stack.dequantize_weight(torch.float32).view(3, -1, wanted.shape[1])
        assert torch.equal(decoded.transpose(1, 2), wanted)
    encoded = stacks(load(directory.parent / "plain", quant={"kind": "mxfp4"}))
    assert all(torch.equal(stack.packed, encoded[name].packed) for name, stack in found.items())
    original = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    original.float()  # transformers 5.16 leaves the experts in bfloat16, which has their values
    torch.testing.assert_close(logits(skeleton.model), logits(original), rtol=1e-6, atol=1e-6)
    assert str(skeleton.prequantized) == "mxfp4: mxfp4, 4 bits, group_size 32"
    spec = skeleton.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert spec.shape == (3, 64, 192)


def test_rows_of_a_part_are_read_alone(directory: Path) -> None:
    """Borders inside and between experts: 17 bytes for 32 weights, of these rows alone."""
    whole = stacks(load(directory))
    skeleton = build_skeleton(base_of(directory), directory)
    with RowReader(skeleton.index) as reader:
        for name, stack in stacks(skeleton).items():
            assert stack.stored is not None
            rows = stack.packed.shape[0]
            for span in (Span(0, rows // 2 + 1), Span(rows // 2 + 1, rows), Span(7, 8), Span(5, 5)):
                before = reader.bytes_read
                part = stack.stored.read_packed_rows(reader, span)
                assert torch.equal(part, whole[name].packed[span.slice])
                assert reader.bytes_read - before == len(span) * stack.in_features // 32 * 17


def test_damaged_and_other_variants_are_refused(directory: Path, tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts.down_proj"
    files = load_file(directory / "model.safetensors")
    nan = files[f"{stem}_scales"].clone()
    nan[1, 3, 2] = 255
    cases = {
        "a scale is not finite: NaN or infinity in row 67": {f"{stem}_scales": nan},
        "is int8 .* but by config.json .* it is uint8": {
            f"{stem}_blocks": files[f"{stem}_blocks"].view(torch.int8)
        },
        r"has shape \[3, 64, 48\], not \[experts, rows, 3, 16\] with 192 rows": {
            f"{stem}_blocks": files[f"{stem}_blocks"].flatten(2)
        },
        rf"no {stem}_scales: it is incomplete": {f"{stem}_scales": None},
    }
    for number, (text, change) in enumerate(cases.items()):
        damaged = packed.copy(directory, tmp_path / str(number))
        kept = {n: t for n, t in {**files, **change}.items() if t is not None}
        packed.save(kept, damaged)
        with pytest.raises(UserError, match=text):
            load(damaged)
    odd = save_tokenized(
        tf.GptOssConfig(**{**GPT_OSS.to_dict(), "intermediate_size": 80}), tmp_path / "odd"
    )
    tensors = load_file(odd / "model.safetensors")
    for name in [n for n in tensors if n.endswith("down_proj")]:
        tensors[f"{name}_blocks"] = torch.zeros(3, 64, 2, 16, dtype=torch.uint8)
        del tensors[name]
    packed.save(tensors, odd)
    packed.set_config(odd, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match="80 in_features, which groups of 32 do not divide"):
        load(odd)
