"""Bits and groups; whole directories are in ``test_integer.py``."""

from pathlib import Path

import pytest
import torch

from dist_peft.core.errors import UserError
from dist_peft.model.prequantized.integer_settings import (
    check_bits,
    find_common_group_size,
    list_code_shapes,
    read_group_size,
)
from dist_peft.store.index import SafetensorsIndex
from tests.support import packed


def test_bits_and_groups(tmp_path: Path) -> None:
    codes = {"a.codes": torch.zeros(4, 3), "b.codes": torch.zeros(2), "a.scales": torch.zeros(1, 1)}
    packed.save(codes, tmp_path)
    index = SafetensorsIndex.open(tmp_path)
    assert list_code_shapes(index, ".codes") == [(4, 3)]
    assert check_bits(3, "bits", index) == 3 and read_group_size(40, index) == 40
    for bits in (5, True, None):
        with pytest.raises(UserError, match=rf"has bits {bits} in its quantization_config; 2, 3"):
            check_bits(bits, "bits", index)
    for size in (0, 12, -1, "64", None):
        with pytest.raises(UserError, match=r"multiples of 8 are read"):
            read_group_size(size, index)
    assert find_common_group_size([256, 192], index) == 64
    assert find_common_group_size([40], index) == 8
    with pytest.raises(UserError, match="in_features 8 does not divide"):
        find_common_group_size([64, 12], index)
