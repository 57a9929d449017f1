"""The trial of another way to decode NF4."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_peft.quant import decode_trial
from dist_peft.quant.decode_trial import is_equal_and_faster


class Counting:
    """A way to decode whose time is the number of its calls; it can be wrong for one shape."""

    def __init__(self, seconds: float, wrong: tuple[int, int] | None = None) -> None:
        self.seconds, self.wrong, self.shapes = seconds, wrong, set[tuple[int, int]]()

    def __call__(self, payload: Tensor, absmax: Tensor) -> Tensor:
        assert type(payload) is Tensor  # not a fake one
        self.shapes.add((absmax.shape[0], absmax.shape[1]))
        clock[0] += self.seconds
        result = payload.float() * absmax[:, :1]
        if tuple(absmax.shape) == self.wrong:
            result[-1, -1] = torch.nextafter(result[-1, -1], torch.tensor(torch.inf))
        return result


clock = [0.0]


@pytest.fixture(autouse=True)
def count_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_trial.time, "thread_time", lambda: clock[0])


@pytest.mark.parametrize(("seconds", "faster"), [(0.5, True), (0.95, False), (2.0, False)])
def test_the_faster_way_by_a_margin(seconds: float, faster: bool) -> None:
    with FakeTensorMode():  # the thread of the trial has no mode
        assert is_equal_and_faster(Counting(seconds), Counting(1.0), 64) is faster


@pytest.mark.parametrize("shape", decode_trial._SHAPES)
def test_one_wrong_bit_in_one_shape_is_enough(shape: tuple[int, int]) -> None:
    other = Counting(0.1, wrong=shape)
    assert not is_equal_and_faster(other, Counting(1.0), 32)
    assert shape in other.shapes


def test_examples_have_all_bytes_and_a_zero_scale() -> None:
    payload, absmax = decode_trial._make_example(33, 16, 64)
    assert len(payload.unique()) == 256 and payload.shape == (33, 512)
    assert absmax.min() == 0 and absmax.max() > 1e4 and absmax.isfinite().all()
