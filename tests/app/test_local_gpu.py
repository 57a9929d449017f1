"""Cards to plan for."""

import pytest

from dist_peft.app.local_gpu import make_cluster
from dist_peft.core.errors import UserError


def test_memory_as_given_of_this_host_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, known = make_cluster(2, 8, "24GiB")
    assert known and cluster.ranks == 16 and cluster.gpu_memory == 24 << 30
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert make_cluster(1, 1, None)[1] is False
    with pytest.raises(UserError, match="no amount of memory"):
        make_cluster(1, 1, "large")
