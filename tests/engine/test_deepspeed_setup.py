from unittest import mock

import pytest
import torch
from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.engine import deepspeed_setup


def test_frozen_parameters_are_attributes_and_in_no_list() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    frozen = model[0].weight.requires_grad_(False)
    deepspeed_setup.hide_frozen_parameters(model)
    assert model[0].weight is frozen
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "1.weight", "1.bias"]
    deepspeed_setup.hide_frozen_parameters(model)  # once more changes nothing
    assert model[0].weight is frozen and model(torch.ones(1, 2)).shape == (1, 1)


def test_missing_package_is_named_with_the_fix() -> None:
    with (
        mock.patch.object(deepspeed_setup.importlib, "import_module", side_effect=ImportError),
        pytest.raises(UserError, match=r"pip install 'dist_peft\[deepspeed\]'"),
    ):
        deepspeed_setup.import_deepspeed(torch.device("cpu"))
