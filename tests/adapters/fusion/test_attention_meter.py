import torch

from dist_peft.adapters.fusion.attention_meter import AttentionMeter


def test_weighted_sums_by_task() -> None:
    meter = AttentionMeter()
    attention = torch.tensor([[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])
    weights = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    for _ in range(2):
        with meter.count_attention(weights, [1, 0], 3):
            assert meter.is_counting
            meter.add_attention("a", attention)
    assert not meter.is_counting
    expected = torch.tensor([[2.0, 2.0], [2.25, 0.75], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(meter.sums["a"], 2 * expected)
