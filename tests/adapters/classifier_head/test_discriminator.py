import torch
from torch.nn import functional

from dist_peft.adapters.classifier_head.discriminator import DomainDiscriminator, reverse_gradient
from dist_peft.core.span import Span


def make_discriminator(columns: int = 7) -> DomainDiscriminator:
    made = DomainDiscriminator("classifier.discriminator", columns, 5, 3, seed=1)
    for name, shape in made.shapes.items():
        value = made.init_rows(name, Span(0, shape[0]))
        setattr(made, name, torch.nn.Parameter(value))
    return made


def test_rows_of_the_initialization_do_not_depend_on_ranks() -> None:
    made = make_discriminator()
    for name, shape in made.shapes.items():
        whole = getattr(made, name)
        parts = [made.init_rows(name, s) for s in (Span(0, 2), Span(2, shape[0]))]
        assert torch.equal(torch.cat(parts), whole)
        assert bool(whole.any()) == name.endswith("weight")


def test_the_gradient_is_reversed() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    (plain,) = torch.autograd.grad(x.square().sum(), x)
    (found,) = torch.autograd.grad(reverse_gradient(x, 0.3).square().sum(), x)
    torch.testing.assert_close(found, -0.3 * plain)


def test_two_layers_in_float32() -> None:
    made = make_discriminator()
    state = torch.randn(4, 7, dtype=torch.bfloat16)
    f = state.float()
    hidden = functional.relu(f @ made.hidden_weight.T + made.hidden_bias)
    torch.testing.assert_close(made(state), hidden @ made.output_weight.T + made.output_bias)


def test_the_state_of_the_last_token() -> None:
    made, states = make_discriminator(), torch.randn(2, 6, 7)
    made.last_tokens = torch.tensor([3, 5])
    torch.testing.assert_close(made(states), made(states[[0, 1], [3, 5]]))
    made.last_tokens = None  # not told: of whole rows
    torch.testing.assert_close(made(states), made(states[:, -1]))
