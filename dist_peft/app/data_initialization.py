"""Initialize LoRA from training data: EVA and LoRA-GA (``adapter.init``).

After the base is loaded and before the optimizer is set up, the first sequences of the run's own
order go through the sharded model, with the base's function. Sums for each linear
(``calibration_sums``) give its factors, of which each rank stores its rows::

    EVA       forward                Gram matrix of a linear's inputs at the target tokens
    LoRA-GA   forward and backward   gradient of the weight, of the loss summed over targets

A resumed run does none of it: ``lora_A`` and ``lora_B`` come from the checkpoint, and so do the
frozen ones of LoRA-GA (``Adapter.list_init_factors``).
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_peft.adapters.lora.eva import (
    compute_eva_components,
    redistribute_ranks,
    with_ones_column,
)
from dist_peft.adapters.lora.gradient_directions import compute_gradient_factors
from dist_peft.adapters.lora.layer import LoraLinear
from dist_peft.adapters.targets import resolve_pattern_value
from dist_peft.app.calibration_sums import BYTES_AT_ONCE, CalibrationSums
from dist_peft.app.data_setup import DataLoaders
from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import LoraConfig
from dist_peft.core.errors import UserError
from dist_peft.core.log import FILE_ONLY
from dist_peft.core.progress_beat import SETUP_PATIENCE, enter_phase
from dist_peft.core.seeds import derive_seed
from dist_peft.core.world import World
from dist_peft.data.loader import Batch
from dist_peft.model.adapter_module import SwitchableLayer

__all__ = ["initialize_from_data"]

log = logging.getLogger("dist_peft")


def initialize_from_data(
    built: LoadedModel, loaders: DataLoaders, world: World, bytes_at_once: int = BYTES_AT_ONCE
) -> None:
    """Fill the factors of a loaded adapter whose ``adapter.init`` is eva or lora_ga; else nothing.

    A collective; called before ``setup_optimizer``.

    Args:
        bytes_at_once: of sums in memory; changes the number of passes, not the result.

    Raises:
        UserError: on every rank: too few targets, values that are not finite, or a linear that the
            model does not reach.
        StopRequested: a signal.
    """
    config = built.setup.config.adapter
    if not isinstance(config, LoraConfig) or not config.uses_training_data:
        return
    start = time.perf_counter()
    run = _DataInitialization(built, config, loaders, world, bytes_at_once)
    with enter_phase("initialize the adapter", SETUP_PATIENCE):
        if config.init == "eva":
            run.initialize_eva()
        else:
            run.initialize_lora_ga()
    log.info("adapter.init %s took %.1f s", config.init, time.perf_counter() - start)


class _DataInitialization:
    def __init__(
        self,
        built: LoadedModel,
        config: LoraConfig,
        loaders: DataLoaders,
        world: World,
        bytes_at_once: int,
    ) -> None:
        self.built, self.config, self.world = built, config, world
        self.model, self.engine = built.model, built.engine
        self.objective: Any = loaders.objective
        self.layers = {
            name: m for name, m in self.model.named_modules() if isinstance(m, LoraLinear)
        }
        samples = min(config.init_samples, len(loaders.train.rows))
        self.batches = loaders.train.load_first_sequences(samples)
        self.sums = CalibrationSums(
            world,
            self.engine.device,
            self.batches,
            self._sum_inputs if config.init == "eva" else self._compute_gradients,
            samples,
            f"adapter.init {config.init}",
            bytes_at_once,
        )

    # -- EVA -----------------------------------------------------------------------------------

    def initialize_eva(self) -> None:
        leaders = self._find_shared_inputs()
        members: dict[str, list[str]] = {}
        for name, leader in leaders.items():
            members.setdefault(leader, []).append(name)
        most = {leader: max(self.layers[n].spec.r for n in m) for leader, m in members.items()}
        columns = {leader: self.layers[leader].base.in_features for leader in members}

        def compute(leader: str, gram: Tensor) -> Tensor:
            components, shares = compute_eva_components(gram, most[leader])
            return torch.cat([components.flatten(), shares]).float()

        components: dict[str, Tensor] = {}
        shares: dict[str, list[float]] = {}
        for leader, result in self.sums.map_sums(
            {leader: (n + 1, n + 1) for leader, n in columns.items()},
            {leader: most[leader] * (n + 1) for leader, n in columns.items()},
            compute,
        ):
            components[leader] = result[: -most[leader]].view(most[leader], -1).cpu()
            shares[leader] = result[-most[leader] :].tolist()
        ranks = self._choose_ranks({n: shares[leaders[n]] for n in self.layers})
        for name, layer in self.layers.items():
            A = components[leaders[name]][: layer.spec.r].clone()
            A[ranks[name] :] = 0
            self._fill(layer, "lora_A", A)
            log.info(
                "%s: rank %d explains %.1f %% of its inputs' variance",
                name,
                ranks[name],
                100 * sum(shares[leaders[name]][: ranks[name]]),
                extra=FILE_ONLY,
            )
        explained = [sum(shares[leaders[n]][: ranks[n]]) for n in self.layers]
        log.info(
            "EVA: ranks of %d to %d explain %.0f to %.0f %% of the variance of a linear's inputs",
            min(ranks.values()),
            max(ranks.values()),
            100 * min(explained),
            100 * max(explained),
        )

    def _choose_ranks(self, shares: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """Return the rank of each linear."""
        if self.config.init_rho == 1:
            return {name: layer.spec.r for name, layer in self.layers.items()}
        own = {name: shares[name][: layer.spec.r] for name, layer in self.layers.items()}
        config = self.config
        nominal = {n: resolve_pattern_value(config.rank_pattern, n, config.r) for n in self.layers}
        return redistribute_ranks(own, nominal)

    def _find_shared_inputs(self) -> dict[str, str]:
        """Map each linear to the first one that reads the same tensor (q, k and v do).

        Raises:
            UserError: a linear is never called.
        """
        leaders: dict[str, str] = {}
        last: list[tuple[Tensor, str]] = []

        def note_input(name: str, x: Tensor) -> None:
            if name in leaders:
                return
            if not last or last[0][0] is not x:
                last[:] = [(x, name)]  # a reference to one input only: they take memory
            leaders[name] = last[0][1]

        with self._disabled_layers(), torch.no_grad(), ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_pre_hook(_on_input(name, note_input)).remove)
            self._compute_loss(self.batches[0])
        if idle := [name for name in self.layers if name not in leaders]:
            raise UserError(
                f"adapter.init eva: the training data never reach {idle[0]}; leave it out of "
                "adapter.target_modules"
            )
        return leaders

    @torch.no_grad()
    def _sum_inputs(self, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        counted = self.objective.mark_measured_tokens(batch).flatten().to(self.engine.device)

        def add_gram(name: str, x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) != len(counted):
                raise UserError(
                    f"adapter.init eva: {name} reads {len(rows)} vectors for {len(counted)} "
                    "tokens, so that its inputs are not those of tokens; leave it out of "
                    "adapter.target_modules"
                )
            wide = with_ones_column(rows[counted])
            own = wide.T @ wide
            found[name] = found[name] + own if name in found else own

        with self._disabled_layers(), ExitStack() as hooks:
            for name in names:
                layer = self.layers[name]
                hooks.callback(layer.register_forward_pre_hook(_on_input(name, add_gram)).remove)
            self._compute_loss(batch)
        return found

    # -- LoRA-GA -------------------------------------------------------------------------------

    def initialize_lora_ga(self) -> None:
        config, seed = self.config, self.built.setup.config.train.seed

        def compute(name: str, gradient: Tensor) -> Tensor:
            start = compute_gradient_factors(
                gradient,
                self.layers[name].spec.r,
                config.init_gamma,
                iterations=config.init_iterations,
                seed=derive_seed(seed, name, config.init),
            )
            return torch.cat([start.A.flatten(), start.B.flatten()])

        shapes = {n: (m.base.out_features, m.base.in_features) for n, m in self.layers.items()}
        sizes = {name: self.layers[name].spec.r * sum(shape) for name, shape in shapes.items()}
        for name, result in self.sums.map_sums(shapes, sizes, compute):
            layer = self.layers[name]
            count = layer.spec.r * layer.base.in_features
            A, B = result[:count].view(layer.spec.r, -1), result[count:].view(-1, layer.spec.r)
            for prefix in ("lora", "start"):
                self._fill(layer, f"{prefix}_A", A)
                self._fill(layer, f"{prefix}_B", B)

    def _compute_gradients(self, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """Return the gradient of the weights of ``names``.

        ``B`` and ``A`` are still zero or already at their start, so the model computes the base's
        function; the layers stay enabled, since their factors are what a gradient flows through.
        """
        found: dict[str, Tensor] = {}

        def watch_output(name: str, x: Tensor, output: Tensor) -> None:
            def add_gradient(grad: Tensor) -> None:
                rows = grad.reshape(-1, grad.shape[-1]).double()
                own = rows.T @ x.reshape(-1, x.shape[-1]).double()
                found[name] = found[name] + own if name in found else own

            # a block that is computed again for backward comes here twice; of the second output no
            # gradient is computed
            if output.requires_grad:
                output.register_hook(add_gradient)

        with torch.enable_grad(), ExitStack() as hooks:
            for name in names:
                layer = self.layers[name]
                hooks.callback(layer.register_forward_hook(_on_output(name, watch_output)).remove)
            self._compute_loss(batch).backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    # -- shared --------------------------------------------------------------------------------

    def _compute_loss(self, batch: Batch) -> Tensor:
        self.built.setup.adapter.begin_micro_batch(0, batch.sample_ids)
        loss: Tensor = self.objective.compute_loss(
            self.model, batch, self.engine.device, self.model
        )
        return loss

    @contextmanager
    def _disabled_layers(self) -> Iterator[None]:
        """The base's function, with a classification head where there is one."""
        layers = [m for m in self.model.modules() if isinstance(m, SwitchableLayer)]
        for layer in layers:
            layer.is_enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.is_enabled = True

    def _fill(self, layer: LoraLinear, name: str, whole: Tensor) -> None:
        span = self.engine.local_row_span(getattr(layer, name))
        # a copy: an engine may keep these very values, and lora_A and start_A begin as the same
        self.engine.fill_local_rows(layer, name, whole[span.slice].clone())


def _on_input(name: str, use: Any) -> Any:
    """A forward pre-hook that calls ``use(name, x)``."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        use(name, args[0])

    return hook


def _on_output(name: str, use: Any) -> Any:
    """A forward hook that calls ``use(name, x, y)``."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        use(name, args[0].detach(), output)

    return hook
