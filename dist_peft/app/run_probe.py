"""The probe of a run: tokens with their logits before and after training, to verify exports."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dist_peft.adapters.adapter_switch import can_disable_adapter, disable_adapter
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.log import ONCE
from dist_peft.core.world import World
from dist_peft.export.verify import Probe
from dist_peft.train.evaluate import inference_mode

__all__ = ["RunProbe"]

log = logging.getLogger("dist_peft")


@dataclass(frozen=True)
class RunProbe:
    """``probe.safetensors`` of a run directory.

    Attributes:
        path: the file.
        tokens: probe tokens, ``[sequences, tokens]``.
    """

    path: Path
    tokens: Tensor
    built: LoadedModel
    world: World

    def save_untrained(self) -> None:
        """Save the logits of the base, or of a model that is not trained yet. Collective."""
        logits = self.compute_base_logits()
        probe = Probe(self.tokens, logits, logits)
        self.world.run_on_first("write the probe", lambda: probe.save_probe(self.path))

    def restore(self) -> None:
        """Check the probe that the run saved at its start; save it again if it is missing.

        Raises:
            UserError: on every rank: the probe is damaged.
        """
        missing = self.world.any_rank(self.world.is_first and not self.path.is_file())
        if not missing:
            with self.world.raise_together("read the probe"):
                if self.world.is_first:
                    Probe.load_probe(self.path)
        elif can_disable_adapter(self.built.model):
            log.info("%s is missing and is computed again", self.path)
            self.save_untrained()
        else:
            log.warning("%s is missing: exports cannot be verified", self.path, extra=ONCE)

    def add_trained_logits(self, logits: Tensor) -> None:
        """Complete the file with the logits of the trained model; called on the first rank."""
        if self.path.is_file():
            self.save_logits(self.path, Probe.load_probe(self.path).before, logits)

    def save_logits(self, path: Path, before: Tensor, after: Tensor) -> None:
        """Write a complete probe to ``path``; called on the first rank."""
        Probe(self.tokens, after, before).save_probe(path)

    def compute_logits(self) -> Tensor:
        """Return logits of the probe tokens; every rank computes the same ones."""
        ids = self.tokens.to(self.built.engine.device)
        with inference_mode(self.built.model):
            return self.built.model(input_ids=ids, use_cache=False).logits.float().cpu()

    def compute_base_logits(self) -> Tensor:
        """Return the logits of the base; of the model as it is where none is left."""
        if not can_disable_adapter(self.built.model):
            return self.compute_logits()
        with disable_adapter(self.built.model):
            return self.compute_logits()
