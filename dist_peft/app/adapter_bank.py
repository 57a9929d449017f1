"""Several adapters on one loaded base, one of them active at a time.

The base is loaded, quantized and sharded once. Adapters of the same method and configuration have
the same parameters, so all share one set of model parameters, and a switch is a copy::

    bank       name -> this rank's part of each adapter parameter, on the CPU
                  |  activate(name)
                  v
    model      active adapter parameters, sharded by the engine, and the frozen base

With one process and with fsdp2 each rank keeps and copies its own rows, without communication.
With zero each rank keeps whole adapters; DeepSpeed's stage 3 exchanges each parameter.

A switch resets the optimizer: zero moments, no steps. Training each adapter of a list is
therefore: activate the initial state, train, write.
"""

from torch import Tensor

from dist_peft.app.model_setup import LoadedModel
from dist_peft.engine.engine_protocol import local_parameters
from dist_peft.train.importance import EngineParameters

__all__ = ["AdapterBank"]


class AdapterBank:
    """Store adapter parameters by name and copy them into the model.

    Args:
        built: a loaded model after ``LoadedModel.setup_optimizer``.
    """

    def __init__(self, built: LoadedModel) -> None:
        self.built = built
        self._kept: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._kept)

    def store_active_adapter(self, name: str) -> None:
        """Store the active adapter under ``name``; call on every rank."""
        self._kept[name] = local_parameters(self.built.engine.training_state_dict(self.built.model))

    def activate_adapter(self, name: str) -> None:
        """Copy the adapter stored under ``name`` into the model; call on every rank.

        Raises:
            KeyError: no adapter is stored under ``name``.
        """
        self.built.engine.load_training_state_dict(self.built.model, self._kept[name], step=0)
        self.built.setup.adapter.finish_load(EngineParameters(self.built.model, self.built.engine))
