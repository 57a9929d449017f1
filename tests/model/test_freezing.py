"""Which linears are packed, and a base of which nothing is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from dist_peft.core.config.run import QuantConfig
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span
from dist_peft.model.freezing import (
    _open_packed_pieces,
    check_base_is_packed,
    compute_packed_share,
    freeze_embeddings,
    is_plain_linear,
)
from dist_peft.model.frozen_linear import FrozenLinear, StackPiece
from dist_peft.quant.affine import AffineCodec
from dist_peft.quant.codec import make_codec
from dist_peft.quant.ordered_columns import OrderedColumnsCodec
from dist_peft.quant.ordered_stacks import OrderedStackCodec
from dist_peft.store.reader import RowReader
from tests.support.loaded_models import IDS, copy_decoded, load, logits
from tests.support.tiny_models import CONFIGS, TRANSPOSED, save_model


class _Same(nn.Linear):
    pass


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, super().forward(x)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.Linear, True), (FalconLinear, True), (_Same, True), (_Scaled, False), (_Pair, False)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_plain_linear(kind: type[nn.Linear], plain: bool, bias: bool) -> None:
    module = kind(8, 4, bias=bias, device="meta")
    assert is_plain_linear(module) == plain
    assert module.weight.shape == (4, 8)
    assert not is_plain_linear(nn.Embedding(3, 4))


def test_falcon_is_packed(tmp_path: Path) -> None:
    config = tf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1
    )
    original = save_model(config, tmp_path)
    plain = load(tmp_path).model
    torch.testing.assert_close(
        logits(plain, input_ids=IDS), logits(original, input_ids=IDS), rtol=0, atol=1e-6
    )
    packed = load(tmp_path, quant=QuantConfig()).model
    assert 0.5 < compute_packed_share(packed) < 1
    assert compute_packed_share(plain) == 0


@pytest.mark.parametrize("family", TRANSPOSED)
def test_conv1d_is_packed(family: str, tmp_path: Path) -> None:
    """Its rows are columns in the files, of which a rank reads its own."""
    original = save_model(TRANSPOSED[family], tmp_path)
    plain = load(tmp_path)
    expected = logits(original, input_ids=IDS)
    torch.testing.assert_close(logits(plain.model, input_ids=IDS), expected, rtol=0, atol=1e-6)
    packed = load(tmp_path, quant=QuantConfig(kind="int", bits=4, group_size=32)).model
    copy_decoded(packed, original)
    torch.testing.assert_close(
        logits(packed, input_ids=IDS), logits(original, input_ids=IDS), rtol=1e-5, atol=1e-5
    )
    linear = packed.get_submodule("transformer.h.1.attn.c_attn")
    assert isinstance(linear, FrozenLinear) and linear.packed.shape[0] == 192
    whole = load_file(tmp_path / "model.safetensors")[linear.source].T
    with RowReader(plain.index) as reader:
        for span in (Span(0, 192), Span(7, 101), Span(192, 192)):
            before = reader.bytes_read
            assert torch.equal(linear.read_packed_rows(reader, span), whole[span.slice])
            assert reader.bytes_read - before == 4 * 64 * len(span)


class _Kernel(nn.Module):
    """Matrices that are no linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 4))


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"base\.quant packs nothing of DIR: .*of class _Kernel"):
        check_base_is_packed(_Kernel(), [_Kernel()], "DIR")


def test_share_by_hand(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    model = load(tmp_path, quant=QuantConfig(kind="int", bits=4, group_size=32)).model
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    inside = sum(size for n, size in sizes.items() if n.endswith("packed") and "layers" in n)
    assert compute_packed_share(model) == pytest.approx(inside / sum(sizes.values()))
    assert torch.is_grad_enabled()


class _Ends(nn.Module):
    """An embedding and a head, and perhaps another user of the embedding's weight."""

    def __init__(self, embedding: nn.Module, head: nn.Module, other: nn.Module | None) -> None:
        super().__init__()
        self.embedding, self.head, self.other = embedding, head, other

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _embedding(**settings: Any) -> nn.Embedding:
    return nn.Embedding(8, 16, **settings)


_SHARED = _embedding()


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (_Ends(nn.EmbeddingBag(8, 16), nn.Linear(16, 8), None), "is a EmbeddingBag"),
        (_Ends(_embedding(max_norm=1.0), nn.Linear(16, 8), None), "is a Embedding"),
        (_Ends(_embedding(), _Scaled(16, 8), None), "more than a linear"),
        (_Ends(_embedding(), nn.Linear(16, 8), None).half(), "not kept in float32"),
        (_Ends(_SHARED, nn.Linear(16, 8), nn.ModuleList([_SHARED])), "other modules use"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_embeddings_that_cannot_be_packed_are_refused(ends: _Ends, reason: str) -> None:
    codec = make_codec(QuantConfig(), torch.float32)
    with pytest.raises(UserError, match=f"base.quant.embeddings cannot pack .*{reason}"):
        freeze_embeddings(cast(Any, ends), codec, torch.float32, set(), "BASE")
    plain = {id(ends.head)}
    with pytest.raises(UserError, match=r"base\.quant\.embeddings"):
        freeze_embeddings(cast(Any, ends), codec, torch.float32, plain, "BASE")


def test_a_head_whose_weight_code_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(CONFIGS["llama"], tmp_path)
    forward = tf.LlamaForCausalLM.forward

    def read_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert getattr(self, read[-1])().weight.dtype == torch.float32  # as no source shows it
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", read_weight)
    read: list[str] = []
    for name in ("get_output_embeddings", "get_input_embeddings"):
        read.append(name)
        with pytest.raises(UserError, match=r"base\.quant\.embeddings.*set it to false"):
            load(tmp_path, quant=QuantConfig(embeddings=True))
        load(tmp_path, quant=QuantConfig())


def test_experts_in_act_order_share_a_codec_unless_their_groups_differ() -> None:
    """Each expert has an order of its own; groups of other sizes are another codec."""

    class Packed:
        format_label = "gptq"
        group = 16

        def open_linear(self, name: str, rows: int, columns: int) -> Any:
            order = torch.arange(32) if name == "first" else torch.arange(31, -1, -1)
            codec = OrderedColumnsCodec.from_order(AffineCodec(4, 16), order)
            if name != "first" and self.group != 16:
                codec = OrderedColumnsCodec.from_order(AffineCodec(4, self.group), order)
            return SimpleNamespace(codec=codec, in_features=columns)

    pieces, opened = (StackPiece("first", Span(0, 8)), StackPiece("second", Span(8, 16))), Packed()
    found = _open_packed_pieces(opened, pieces, 32)  # type: ignore[arg-type]
    assert found is not None and isinstance(found.codec, OrderedStackCodec)
    opened.group = 8
    with pytest.raises(UserError, match=r"experts next to first are not all stored alike; give"):
        _open_packed_pieces(opened, pieces, 32)  # type: ignore[arg-type]
