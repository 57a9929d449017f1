"""Under an assumed device code takes that device's way, and afterwards its own again."""

import pytest
import torch

from dist_peft.core.span import Span
from dist_peft.quant.assumed_device import assume_device, get_assumed_device
from dist_peft.quant.cpu_products import has_fast_product
from dist_peft.quant.grouped_matmul import RowGroups, count_sorted
from dist_peft.quant.kernels import choose_nf4_kernel
from dist_peft.quant.packed_rows import list_row_chunks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_outer_device_returns_after_an_error() -> None:
    assert get_assumed_device() is None
    with assume_device(CPU):
        with pytest.raises(ValueError, match="inside"), assume_device(CUDA):
            _fail_on(CUDA)
        assert get_assumed_device() == CPU
    assert get_assumed_device() is None


def _fail_on(device: torch.device) -> None:
    assert get_assumed_device() == device
    raise ValueError("inside")


def test_the_way_of_the_assumed_device() -> None:
    own = list_row_chunks(1000, 2**16, CPU)
    assert len(own) == 250
    chosen = torch.tensor([0, 2, 2, 2])
    with assume_device(CUDA):
        assert list_row_chunks(1000, 2**16, CPU) == [Span(0, 64)]
        assert has_fast_product(CPU, torch.bfloat16)
        assert RowGroups.read_counts(count_sorted(chosen, 3), len(chosen)).counts == (1, 1, 2)
        assert RowGroups.read_counts(count_sorted(chosen, 6), len(chosen)).counts == (
            1,
            1,
            1,
            1,
            0,
            0,
        )
    with assume_device(CPU):
        assert list_row_chunks(1000, 2**16, CUDA) == own[:1]
    assert list_row_chunks(1000, 2**16, CPU) == own
    assert RowGroups.read_counts(count_sorted(chosen, 3), len(chosen)).counts == (1, 0, 3)


def test_bitsandbytes_decodes_on_an_assumed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.delenv("DIST_PEFT_KERNELS", raising=False)
    with assume_device(CUDA):
        assert choose_nf4_kernel(64, torch.bfloat16, CPU) == "bnb"
        assert choose_nf4_kernel(24, torch.bfloat16, CPU) == "torch"
    assert choose_nf4_kernel(64, torch.bfloat16, CPU) == "torch"
