"""Embeddings with LoRA that share their weight compute what each computes alone."""

import copy

import torch
from torch import nn

from dist_peft.adapters.joined.joined_embedding import JoinedEmbedding
from dist_peft.adapters.joined.row_shares import RowShares
from dist_peft.adapters.lora.embedding import LoraEmbedding
from dist_peft.adapters.lora.layer import LoraSpec

VOCABULARY, HIDDEN = 11, 6


def test_sequences_and_gradients_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    base = nn.Embedding(VOCABULARY, HIDDEN).requires_grad_(False)
    layers = {}
    for number, r in {0: 2, 2: 3}.items():
        layer = LoraEmbedding(base, "e", LoraSpec(r, 0.5 + number, torch.float32, number))
        layer.lora_embedding_A = nn.Parameter(torch.randn(r, VOCABULARY))
        layer.lora_embedding_B = nn.Parameter(torch.randn(HIDDEN, r))
        layers[number] = layer
    alone, shares = copy.deepcopy(layers), RowShares()
    joined = JoinedEmbedding(base, "e", layers, shares)
    shares.split_batch([(0, 2), (1, 1), (2, 3)], 6)  # as long as there are sequences
    ids = torch.randint(0, VOCABULARY, (6, 6))
    expected = torch.cat([alone[0](ids[:2]), base(ids[2:3]), alone[2](ids[3:])])
    found = joined(ids)
    assert torch.equal(found, expected) and joined.weight is base.weight
    own, wanted = (
        [q for layer in group.values() for q in (layer.lora_embedding_A, layer.lora_embedding_B)]
        for group in (layers, alone)
    )
    grads = torch.autograd.grad(found.square().sum(), own)
    others = torch.autograd.grad(expected.square().sum(), wanted)
    for mine, other in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, other)
