import torch

from dist_peft.train.rank_load import StepLoad


def test_share_of_the_slowest_ranks_work() -> None:
    load = StepLoad(torch.device("cpu"))
    found = load.describe_maxima([100.0, 0.0, 4.0, -3.0], ranks=2)
    assert found == {"mem_peak": 100, "mem_reserved": None, "straggler_share": 0.25}
    assert load.describe_maxima([100.0, 0.0, 4.0, -4.0], ranks=1)["straggler_share"] is None
    assert load.describe_maxima([100.0, 0.0, 0.0, 0.0], ranks=2)["straggler_share"] is None


def test_gpus_have_reserved_memory_and_no_share() -> None:
    load = StepLoad(torch.device("cuda"))
    found = load.describe_maxima([100.0, 120.0, 4.0, -3.0], ranks=2)
    assert found == {"mem_peak": 100, "mem_reserved": 120, "straggler_share": None}


def test_work_of_a_step_is_its_processor_time() -> None:
    load = StepLoad(torch.device("cpu"))
    sum(range(200_000))
    memory, reserved, most, least = load.list_exchanged()
    assert memory > 2**20 and reserved == 0 and most == -least > 0
