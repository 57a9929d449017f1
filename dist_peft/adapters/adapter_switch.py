"""Switch an attached adapter off for some forwards: the model then computes the base's function.

A layer of an adapter is a ``SwitchableLayer`` and looks at ``is_enabled`` in its forward::

    wrapper (LoRA, IA3, ...)        y = base(x)
    inserted (bottleneck, fusion)   f' = f
    virtual tokens                  none are inserted

With PiSSA and LoftQ the stored base is the residual of the initial factors, so their layers add
those: the function that training started from. Nothing is moved or gathered, so a switch costs
nothing on any engine.

Methods that change weights of the base (full and partial fine-tuning, LoRA through the quantizer),
and a classification head, of which the base has none, leave no base function to go back to.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.model.adapter_module import SwitchableLayer

__all__ = ["can_disable_adapter", "disable_adapter"]


def can_disable_adapter(model: nn.Module) -> bool:
    """Return whether every trainable parameter of ``model`` is in a ``SwitchableLayer`` that keeps
    the base's function."""
    return all(
        isinstance(module, SwitchableLayer) and module.keeps_base
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the adapter of ``model`` off in the body, and on again after it, whatever it raises.

    A backward pass of a forward in the body has to be in the body too, since activation
    checkpointing computes blocks again. Bodies may be nested.

    Raises:
        UserError: the adapter cannot be switched off.
    """
    if not can_disable_adapter(model):
        raise UserError(
            "the base's own function is needed, but this run trains weights of the base or a "
            "classification head and keeps no others; use an adapter.kind that leaves the base as "
            "it is, such as lora without through_quantizer, with base.head lm"
        )
    modules = [m for m in model.modules() if isinstance(m, SwitchableLayer)]
    switched = [module for module in modules if module.is_enabled]
    for module in switched:
        module.is_enabled = False
    try:
        yield
    finally:
        for module in switched:
            module.is_enabled = True
