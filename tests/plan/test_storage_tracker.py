import torch
from torch import nn

from dist_peft.plan.storage_tracker import StorageTracker, list_storages


def test_a_storage_counts_once_from_its_making_until_it_is_freed() -> None:
    tracker = StorageTracker()
    kept = torch.zeros(100)
    tracker.add_tensors([kept, kept[3:]], "rest")
    with tracker:
        a = torch.ones(1000)
        b = a.view(10, 100)
        assert tracker.total == 400 + 4000
        c = a + 1
        del a, c
        assert tracker.total == 400 + 4000
        del b
    assert tracker.total == 400
    assert tracker.peaks["start"].total == 400 + 8000
    assert tracker.peaks["start"].by_purpose == {"rest": 400, "start": 8000}


def test_resized_storages_count_with_their_size() -> None:
    tracker = StorageTracker()
    resize = torch.UntypedStorage.resize_
    with tracker:
        a = torch.ones(1000)
        a.untyped_storage().resize_(0)
        assert tracker.total == 0
        a.untyped_storage().resize_(8000)
        assert tracker.total == 8000
    assert torch.UntypedStorage.resize_ is resize


def test_phases_have_their_own_peaks_and_storages_new_purposes() -> None:
    tracker = StorageTracker()
    with tracker:
        tracker.enter_phase("forward 0")
        a = torch.ones(500)
        tracker.relabel_phase("forward 0", "block inputs", ("forward",))
        tracker.enter_phase("forward 1")
        b = torch.ones(250)
        assert tracker.live_by_purpose == {"block inputs": 2000, "forward": 1000}
    assert tracker.peaks["forward 0"].total == 2000
    assert tracker.peaks["forward 1"].total == 3000
    assert len(list_storages([a, b, a])) == 2


def test_memory_of_backward_is_seen() -> None:
    linear, tracker = nn.Linear(30, 40), StorageTracker()
    tracker.add_tensors(linear.parameters(), "rest")
    with tracker:
        linear(torch.ones(7, 30)).square().sum().backward()
        grads = sum(p.grad.numel() * 4 for p in linear.parameters() if p.grad is not None)
        assert grads == 4 * (30 * 40 + 40) and tracker.total == 2 * grads
    assert tracker.peaks["start"].total > 2 * grads
