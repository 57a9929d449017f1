"""Several adapters on one loaded base, one of them live at a time.

The base is loaded, quantized and sharded once. Adapters of the same method and configuration have
the same parameters, so one set of live parameters serves all, and a switch is a copy::

    bank       name -> this rank's part of each adapter parameter, on the CPU
                  |  activate(name)
                  v
    model      live parameters, sharded by the engine, beside the frozen base

With one process and with fsdp2 each rank keeps and copies its own rows, and ranks say nothing to
each other. With zero each rank keeps whole adapters; DeepSpeed's stage 3 exchanges each parameter.

The optimizer starts afresh with a switch: moments zero, no steps. Training each adapter of a list
is therefore: activate the start, fit, write.
"""

from torch import Tensor

from dist_peft.app.model_setup import Built
from dist_peft.engine.protocol import own_parameters

__all__ = ["AdapterBank"]


class AdapterBank:
    """See the module docstring.

    Args:
        built: a loaded model after ``Built.optimize``.
    """

    def __init__(self, built: Built) -> None:
        self.built = built
        self._kept: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._kept)

    def keep(self, name: str) -> None:
        """Keep what is live now under ``name``; every rank calls it."""
        self._kept[name] = own_parameters(self.built.engine.state(self.built.model))

    def activate(self, name: str) -> None:
        """Make the adapter kept under ``name`` the live one; every rank calls it.

        Raises:
            KeyError: nothing was kept under ``name``.
        """
        self.built.engine.load_state(self.built.model, self._kept[name], step=0)
