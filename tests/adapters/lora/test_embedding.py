import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_peft.adapters.lora.embedding import LoraEmbedding
from dist_peft.adapters.lora.layer import LoraSpec
from dist_peft.core.errors import UserError
from dist_peft.core.span import Span

S = 1.5


class ScaledEmbedding(nn.Embedding):
    """Like Gemma's."""

    embed_scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def embedding(kind: type[nn.Embedding] = nn.Embedding) -> LoraEmbedding:
    torch.manual_seed(0)
    base = kind(11, 6, padding_idx=2).requires_grad_(False)
    if kind is ScaledEmbedding:
        base.register_buffer("embed_scale", torch.tensor(3.0))
    layer = LoraEmbedding(base, "model.embed", LoraSpec(2, S, torch.float32, 0))
    for name, shape in layer.shapes.items():
        setattr(layer, name, nn.Parameter(layer.init_rows(name, Span(0, shape[0]))))
    return layer


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_embedding(kind: type[nn.Embedding]) -> None:
    layer = embedding(kind)
    ids = torch.tensor([[1, 2, 10], [0, 5, 5]])
    assert torch.equal(layer(ids), layer.base(ids))
    assert layer.lora_embedding_B.abs().min() > 0
    layer.lora_embedding_A.data.normal_()
    merged = layer.weight + S * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    scale = 3.0 if kind is ScaledEmbedding else 1.0
    torch.testing.assert_close(layer(ids), F.embedding(ids, merged) * scale)


def test_embedding_learns() -> None:
    layer = embedding()
    layer(torch.tensor([[1, 5, 5]])).sum().backward()
    columns = layer.lora_embedding_A.grad.abs().sum(0).nonzero().flatten().tolist()
    assert columns == [1, 5]
    assert layer.base.weight.grad is None


def test_embedding_with_dora() -> None:
    with pytest.raises(UserError, match="use_dora cannot be combined with"):
        LoraEmbedding(nn.Embedding(4, 4), "e", LoraSpec(2, S, torch.float32, 0, dora=True))


def test_bf16_base_keeps_its_type() -> None:
    layer = embedding()
    layer.base.to(torch.bfloat16)
    assert layer(torch.tensor([[1]])).dtype == torch.bfloat16
