"""Units of parameters: bytes come back as they went in, together or in place."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_peft.core.span import row_span
from dist_peft.engine.gather_unit import GatherUnit, ShardedParameter


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 7),
    parts=st.integers(1, 9),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_a_slot_puts_each_ranks_rows_in_their_place(
    rows: int, columns: int, parts: int, dtype: torch.dtype
) -> None:
    """Also where the last ranks have fewer rows, or none."""
    value = (torch.randn(rows, columns) * 50).to(dtype)
    meta = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device="meta"), False)
    chunks = []
    for index in range(parts):
        slot = ShardedParameter(meta, parts)
        slot.local = torch.zeros(slot.part, dtype=torch.uint8)
        parameter = slot.fill_local_rows(value[row_span(rows, parts, index).slice])
        assert parameter.shape == value.shape and parameter.dtype == dtype
        assert parameter.untyped_storage().nbytes() == 0
        chunks.append(slot.local)
    slot.scatter_chunks(torch.stack(chunks))
    assert torch.equal(parameter, value)
    slot.free_full_tensor()
    assert parameter.untyped_storage().nbytes() == 0 and parameter.shape == value.shape


class OtherRanks:
    """An all-gather of ``shares``, each rank's bytes, in one process."""

    def __init__(self, shares: list[Tensor]) -> None:
        self.parts, self.shares = len(shares), shares
        self.outputs: list[Tensor] = []

    def allocate_resting(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def all_gather_chunks(
        self, local: Tensor, output: Tensor | None = None
    ) -> tuple[Tensor, dist.Work | None]:
        assert output is not None
        for place, share in zip(output.view(self.parts, -1), self.shares, strict=True):
            place[: share.numel()] = share
        self.outputs.append(output)
        return output, None


@pytest.mark.parametrize("rows", [7, 9])
def test_a_parameter_gathered_in_place_has_no_buffer(rows: int) -> None:
    value = torch.randn(rows, 3)
    meta = nn.Parameter(torch.empty(rows, 3, device="meta"), False)
    spans = [row_span(rows, 3, index) for index in range(3)]
    others = OtherRanks([value[span.slice].reshape(-1).view(torch.uint8) for span in spans])
    slot = ShardedParameter(meta, 3, in_place=True)
    unit = GatherUnit([slot], others, in_place=[slot])
    parameter = slot.fill_local_rows(value[spans[0].slice])
    for _ in range(2):
        unit.start_all_gather()
        unit.start_all_gather()
        assert len(others.outputs) == 1 and not unit.whole
        unit.wait_gathered()
        assert torch.equal(parameter, value) and unit.whole
        (output,) = others.outputs
        assert output.data_ptr() == parameter.data_ptr()
        assert parameter.untyped_storage().nbytes() == 9 * 3 * 4
        unit.free_full_tensors()
        assert parameter.untyped_storage().nbytes() == 0
        others.outputs.clear()
        del output
    unit.start_all_gather()
    unit.free_full_tensors()  # under way
    assert unit.pending is None and parameter.untyped_storage().nbytes() == 0
