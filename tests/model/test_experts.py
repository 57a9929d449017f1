"""Packed experts against those of ``transformers`` with the same weights."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.span import Span
from dist_peft.model.base_hashes import build_row_hashes
from dist_peft.model.experts import (
    ExpertStack,
    FrozenExperts,
)
from dist_peft.model.frozen_linear import StackPiece
from dist_peft.model.skeleton import build_skeleton
from dist_peft.quant.codec import RawCodec, make_codec
from dist_peft.store.holding_reader import HoldingReader
from dist_peft.store.reader import RowReader
from tests.support.dist import run_ranks
from tests.support.loaded_models import copy_decoded, load
from tests.support.packed_floats import GPT_OSS
from tests.support.rank_loads import load as load_share
from tests.support.rank_loads import share
from tests.support.tiny_models import MIXTURES, save_model

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NF4, INT3 = QuantConfig(), QuantConfig(kind="int", bits=3, group_size=32)


OTHERS = {
    "gpt_oss": GPT_OSS,
    "llama4": tf.Llama4TextConfig(
        **_SIZES, intermediate_size_mlp=72, num_local_experts=3, interleave_moe_layer_step=2
    ),
    "nemotron_h": tf.NemotronHConfig(
        **_SIZES,
        layer_types=["moe", "full_attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=48,
        moe_latent_size=32,
        n_group=1,
        topk_group=1,
    ),
}
"""Transposed and with biases; every token given to every expert; without a gate."""


@pytest.mark.parametrize("quant", [None, NF4, INT3], ids=["none", "nf4", "int3"])
@pytest.mark.parametrize("family", [*MIXTURES, *OTHERS])
def test_model_equals_transformers(
    family: str, quant: QuantConfig | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From files of one tensor an expert: the logits, and the gradient of the embeddings, which
    comes through the routers too."""
    save_model((MIXTURES | OTHERS)[family], tmp_path)
    mine = load(tmp_path, quant=quant).model
    assert "does not use" not in caplog.text
    original = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="eager"
    ).eval()
    if quant is not None:
        copy_decoded(mine, original)
    torch.manual_seed(1)
    embedded = torch.randn(2, 12, 64)
    results = []
    for model in (mine, original):
        x = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_experts_equal_a_loop(tmp_path: Path) -> None:
    """Outputs and the gradients of inputs and routing weights in float64, against the definition;
    expert 1 gets no token, and a token has the same expert twice."""
    torch.manual_seed(0)
    count, hidden, inner = 4, 32, 24
    gate_up, down = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    codec = make_codec(INT3, torch.float32)
    stacks = {}
    for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
        stack = ExpertStack(count, weight.shape[2], weight.shape[1], codec, name, "cpu")
        stack.packed.data = codec.quantize_to_packed(weight.flatten(0, 1))
        stacks[name] = stack
        weight.copy_(stack.dequantize_weight(torch.float32).view(weight.shape))
    experts = FrozenExperts(stacks, act_fn=nn.SiLU())
    index = torch.tensor([[0, 3], [2, 2], [3, 0], [2, 0], [3, 2]])

    def loop(x: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token in range(len(index)):
            parts = []
            for slot, expert in enumerate(index[token].tolist()):
                gate, up = (gate_up[expert].double() @ x[token]).chunk(2)
                inner_state = nn.functional.silu(gate) * up
                parts.append(weights[token, slot] * (down[expert].double() @ inner_state))
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)

    results = []
    for function in (lambda x, w: experts(x, index, w), loop):
        torch.manual_seed(1)
        x = torch.randn(5, hidden, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
        y = function(x, weights)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, weights.grad))
    torch.testing.assert_close(results[0], results[1])


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize(("family", "ranks"), [("mixtral", 3), ("qwen2_moe", 2), ("qwen3_moe", 3)])
def test_each_rank_reads_its_own_rows(family: str, ranks: int, tmp_path: Path) -> None:
    """Across the borders of tensors and experts: together the packed bytes of one process, each
    rank about its share of the files."""
    save_model(MIXTURES[family], tmp_path)
    (whole,) = run_ranks(load_share, 1, tmp_path, NF4)
    parts = run_ranks(load_share, ranks, tmp_path, NF4)
    read_again = 0
    for name, packed in whole.local.items():
        pieces = [part.local[name] for part in parts]
        # a router has so few rows that it may be sharded by columns: each rank reads whole rows
        by_columns = pieces[0].shape[0] == packed.shape[0]
        assert not by_columns or name.endswith("gate.weight")
        read_again += by_columns * (ranks - 1) * packed.nbytes
        assert torch.equal(torch.cat(pieces, int(by_columns)), packed), name
    total = sum(share(tmp_path, 1, 0))
    assert whole.bytes_read == total
    assert sum(part.bytes_read for part in parts) == total + read_again
    assert max(part.bytes_read for part in parts) < 1.1 * total / ranks


def test_rows_of_a_stack_are_read_across_tensors(tmp_path: Path) -> None:
    original = save_model(MIXTURES["mixtral"], tmp_path / "split")
    original.save_pretrained(tmp_path / "fused", save_original_format=False)
    for directory, pieces in (("split", 8), ("fused", 1)):
        base = BaseConfig(path="unused", quant=None, compute_dtype="float32")
        skeleton = build_skeleton(base, tmp_path / directory)
        stack = skeleton.model.get_submodule("model.layers.1.mlp.experts.gate_up_proj")
        assert isinstance(stack, ExpertStack) and len(stack.pieces) == pieces
        whole = original.model.layers[1].mlp.experts.gate_up_proj.detach().flatten(0, 1)
        with RowReader(skeleton.index) as reader:
            for span in (Span(0, len(whole)), Span(100, 319), Span(3, 5), Span(104, 104)):
                before = reader.bytes_read
                assert torch.equal(stack.read_packed_rows(reader, span), whole[span.slice])
                assert reader.bytes_read - before == len(span) * 64 * 4


def test_rows_of_transposed_experts(tmp_path: Path) -> None:
    """Columns of an expert's matrix in the file, across experts; hashed as rows, and kept for the
    next part where the weight is read part by part."""
    original = save_model(GPT_OSS, tmp_path)
    skeleton = build_skeleton(BaseConfig(path="u", quant=None, compute_dtype="float32"), tmp_path)
    stack = skeleton.model.get_submodule("model.layers.1.mlp.experts.gate_up_proj")
    assert isinstance(stack, ExpertStack) and stack.out_features == 192
    whole = original.model.layers[1].mlp.experts.gate_up_proj.detach().transpose(1, 2).flatten(0, 1)
    sums = []
    for spans in ((Span(0, 576),), (Span(0, 190), Span(190, 400), Span(400, 400), Span(400, 576))):
        hashes = build_row_hashes(skeleton)
        with RowReader(skeleton.index, hashes) as reader:
            holding = HoldingReader(reader)
            for span in spans:
                assert torch.equal(stack.read_packed_rows(reader, span), whole[span.slice])
            assert reader.bytes_read == whole.nbytes
            for span in spans:
                assert torch.equal(stack.read_packed_rows(holding, span), whole[span.slice])
        known = hashes.sums[stack.pieces[0].name]
        assert known.is_complete
        sums.append(known.total)
    assert sums[0] == sums[1]


def test_stacks_have_whole_shapes() -> None:
    stack = ExpertStack(3, 16, 8, RawCodec(torch.float32), "stack", "meta")
    stack.pieces = (StackPiece("a", Span(0, 24)),)
    assert stack.packed.shape == (24, 64) and "experts=3" in repr(stack)
