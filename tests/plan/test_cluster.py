import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.errors import UserError
from dist_peft.plan.cluster import Cluster, parse_byte_count, parse_link_rate


def test_amounts_of_memory() -> None:
    assert parse_byte_count("24GiB") == parse_byte_count("24") == 24 * 2**30
    assert parse_byte_count("80GB") == 80 * 10**9
    assert parse_byte_count("1.5TiB") == 3 * 2**39
    assert parse_byte_count("512 MiB") == 2**29


def test_rates_of_links() -> None:
    assert parse_link_rate("400Gbit") == parse_link_rate("50GB") == 50e9
    assert parse_link_rate("100Gbit/s") == parse_link_rate("100Gbps") == 12.5e9


@settings(max_examples=40)
@given(st.text(max_size=12) | st.from_regex(r"[0-9.]{1,4}[kKMGT]?(i?B|bit)?", fullmatch=True))
def test_any_text_is_a_positive_number_or_refused(text: str) -> None:
    for parse in (parse_byte_count, parse_link_rate):
        with contextlib.suppress(UserError):
            assert parse(text) > 0


def test_ranks_and_their_places() -> None:
    cluster = Cluster(3, 4, 2**34)
    world = cluster.make_world(EngineConfig(), rank=6)
    assert (world.size, world.local_rank, world.local_size) == (12, 2, 4)
    assert cluster.make_world(EngineConfig(kind="zero")).launcher == "deepspeed"
    with pytest.raises(UserError, match="'0GiB' is no amount of memory"):
        parse_byte_count("0GiB")
