"""Ranges of steps and sampled blocks, against a list of booleans."""

from hypothesis import given
from hypothesis import strategies as st

from dist_peft.core.trainable_steps import ALWAYS, BlockSampling, SampledBlock, TrainableSteps

STEPS = st.integers(0, 30)


@st.composite
def any_steps(draw: st.DrawFn) -> TrainableSteps:
    start = draw(STEPS)
    stop = draw(st.none() | st.integers(start + 1, 40))
    sampling = BlockSampling(draw(st.integers(0, 3)), 3, draw(st.integers(1, 3)), 4)
    sampled = draw(st.none() | st.builds(SampledBlock, st.just(sampling), st.integers(0, 2)))
    return TrainableSteps(((start, stop),), sampled)


@given(any_steps(), any_steps(), STEPS)
def test_joined_steps_are_those_of_either(
    first: TrainableSteps, second: TrainableSteps, end: int
) -> None:
    if first.sampled is not None:
        second = TrainableSteps(second.ranges)
    joined = first.join(second)
    included = [joined.includes(step) for step in range(end)]
    assert included == [first.includes(s) or second.includes(s) for s in range(end)]
    assert joined.count_until(end) == sum(included)
    starts = [start for start, _ in joined.ranges]
    assert starts == sorted(starts)


def test_always() -> None:
    assert ALWAYS.includes(0) and ALWAYS.count_until(7) == 7
    assert TrainableSteps(((2, 5), (5, 9))).join(ALWAYS) == ALWAYS
    assert TrainableSteps(((2, 5),)).join(TrainableSteps(((5, 9),))).ranges == ((2, 9),)


def test_a_draw_lasts_a_period_and_all_blocks_have_their_turns() -> None:
    sampling = BlockSampling(seed=1, num_blocks=7, count=2, period=5)
    draws = [sampling.list_blocks(step) for step in range(500)]
    assert all(draws[step] == draws[step - step % 5] for step in range(500))
    assert all(len(set(drawn)) == 2 for drawn in draws)
    shares = [sum(block in drawn for drawn in draws[::5]) / 100 for block in range(7)]
    assert all(0.15 < share < 0.45 for share in shares), shares  # 2 of 7
    assert draws != [BlockSampling(2, 7, 2, 5).list_blocks(step) for step in range(500)]
