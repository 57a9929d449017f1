from dataclasses import replace

from dist_peft.plan.cluster import Cluster, FixedShares
from dist_peft.plan.memory import PhasePeak, build_memory_plan, extrapolate_phases
from dist_peft.plan.resting import RestingBytes
from dist_peft.plan.step_trace import StepTrace
from dist_peft.plan.storage_tracker import Peak

RESTING = RestingBytes({"packed base": 600, "padding of shards": 7}, {}, 600, 500, 25, 0, 0)


def make_trace() -> StepTrace:
    peaks = {
        "embedding": {"embedding": 5},
        "forward 0": {"gathered": 40, "forward": 30},
        "forward 1": {"gathered": 20, "forward": 30, "block inputs": 10},
        "head": {"block inputs": 10, "head": 15},
        "backward 1": {"gathered": 30, "backward": 35, "block inputs": 10, "gradients": 8},
        "backward 0": {"gathered": 20, "backward": 35, "gradients": 8},
        "step": {"gradients": 8},
    }
    trace = StepTrace((0, 1), {"base": 500, "adapter": 100, "buffers": 0}, input_bytes=10)
    rest = {"base": 500, "adapter": 100}
    trace.peaks = {n: Peak(600 + sum(p.values()), rest | p) for n, p in peaks.items()}
    trace.kept_gradients, trace.reduced_gradients = 8, 2
    return trace


def test_further_blocks_add_inputs_and_kept_gradients() -> None:
    phases = {
        p.phase: p
        for p in extrapolate_phases(make_trace(), RESTING, 10, (25, 125), frees_kept=False)
    }
    assert phases["forward"].total == 40 + 30 + 8 * 10 + 4 * 8
    assert phases["head"].items["block inputs"] == 10 + 8 * 10
    assert phases["backward"].items == {
        "gathered units": 30,
        "activations": 35,
        "block inputs": 90,
        "gradients": 8 + 32,
    }
    assert phases["step"].total == 8 + 8 * 1


def test_blocks_below_the_first_trained_parameter_have_no_backward_pass() -> None:
    trace = make_trace()
    whole = extrapolate_phases(trace, RESTING, 10, (25, 125), frees_kept=False)
    for number in (0, 1):
        del trace.peaks[f"backward {number}"]
        found = extrapolate_phases(trace, RESTING, 10, (25, 125), frees_kept=False)
        left = [peak for peak in whole if peak.phase != "backward"]
        assert [peak for peak in found if peak.phase != "backward"] == left
        assert any(peak.phase == "backward" for peak in found) == (number == 0)


def test_padding_at_rest_is_not_counted_twice() -> None:
    once = extrapolate_phases(make_trace(), RESTING, 10, (25, 125), frees_kept=False)
    resting = replace(RESTING, late_padding=7)
    padded = extrapolate_phases(make_trace(), resting, 10, (25, 125), frees_kept=True)
    assert max(p.total for p in padded) == max(p.total for p in once) - 7


def test_what_a_card_has_left() -> None:
    phases = [PhasePeak("forward", {"activations": 100}), PhasePeak("backward", {"gradients": 200})]
    shares = FixedShares(context=50, nccl=30, fragmentation=0.1)
    plan = build_memory_plan(RESTING, phases, Cluster(1, 2, 1000), shares)
    assert plan.peak_phase == "backward" and plan.allocated == 607 + 200
    assert plan.total == 807 + 50 + 30 + 80
    assert plan.spare == 33 and plan.fits
    alone = build_memory_plan(RESTING, phases, Cluster(1, 1, 900), shares)
    assert alone.total == 807 + 50 + 80 and not alone.fits
