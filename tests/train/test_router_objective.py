"""Which tokens the routers' loss counts."""

import torch

from dist_peft.data.loader import Batch
from dist_peft.train.router_objective import mark_real_tokens


def test_padding_and_documents_without_targets_do_not_count() -> None:
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    labels = torch.full((3, 7), -100)
    labels[0, 1] = labels[0, 5] = labels[1, 3] = 5
    batch = Batch(places, labels, places, torch.tensor([0, 1, -1]))
    wanted = [[1, 1, 1, 0, 0, 1, 1], [1] * 7, [0] * 7]
    assert torch.equal(mark_real_tokens(batch), torch.tensor(wanted))
