import peft
import torch

from dist_peft.adapters.vera.projections import SharedProjections, draw_projections
from tests.support.adapters import tiny_llama


def test_equal_to_pefts_bit_for_bit() -> None:
    config = peft.VeraConfig(r=5, target_modules=["q_proj", "down_proj"], projection_prng_key=11)
    theirs = peft.get_peft_model(tiny_llama(), config).base_model
    A, B = draw_projections(5, [(32, 32), (32, 48)], 11)
    assert torch.equal(A, theirs.vera_A["default"]) and torch.equal(B, theirs.vera_B["default"])
    assert A.shape == (5, 48) and B.shape == (32, 5)


def test_moved_once_and_in_no_checkpoint() -> None:
    shared = SharedProjections(torch.ones(2, 3), torch.ones(4, 2))
    owners = torch.nn.ModuleList([torch.nn.ModuleDict({"p": shared}) for _ in range(3)])
    assert len(list(owners.buffers())) == 2 and not owners.state_dict()
