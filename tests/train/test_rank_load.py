import pytest
import torch

from dist_peft.core.world import World
from dist_peft.train.rank_load import StepLoad

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_share_and_rates_of_the_ranks() -> None:
    """Rank 1 works for 4 s of the step's 8, the others for 3 and 2: without waiting they would
    be done after 6 and 4 s of 8."""
    load = StepLoad(CPU, World(rank=0, size=3))
    found = load.describe_maxima([100.0, 0.0, 3.0, 4.0, 2.0], [60, 80, 20], 8.0)
    assert found == {
        "mem_peak": 100,
        "mem_reserved": None,
        "straggler_share": 0.5,
        "rank_rate_min": 20 / 4,
        "rank_rate_median": 60 / 6,
        "rank_rate_max": 80 / 8,
        "slowest_rank": 1,
    }


def test_one_rank_waits_for_none_and_idle_clocks_give_no_share() -> None:
    alone = StepLoad(CPU, World()).describe_maxima([100.0, 0.0, 4.0], [7], 1.0)
    assert alone == {"mem_peak": 100, "mem_reserved": None, "straggler_share": None}
    coarse = StepLoad(CPU, World(rank=0, size=2)).describe_maxima(
        [100.0, 0.0, 0.0, 0.0], [7, 9], 2.0
    )
    assert coarse["straggler_share"] is None and "slowest_rank" not in coarse
    assert (coarse["rank_rate_min"], coarse["rank_rate_max"]) == (3.5, 4.5)


def test_gpus_have_reserved_memory_and_no_share() -> None:
    load = StepLoad(GPU, World(rank=1, size=2))
    found = load.describe_maxima([100.0, 120.0, 4.0, 3.0], [10, 30], 2.0)
    assert (found["mem_peak"], found["mem_reserved"]) == (100, 120)
    assert found["straggler_share"] is None and "slowest_rank" not in found
    rates = [found[f"rank_rate_{name}"] for name in ("min", "median", "max")]
    assert rates == [5.0, 10.0, 15.0]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 3), (2, 3)])
def test_each_rank_has_a_place_of_its_own(rank: int, ranks: int) -> None:
    load = StepLoad(CPU, World(rank=rank, size=ranks))
    sum(range(200_000))
    memory, reserved, *places = load.list_exchanged()
    assert memory > 2**20 and reserved == 0 and len(places) == ranks
    assert [place > 0 for place in places] == [place == rank for place in range(ranks)]
