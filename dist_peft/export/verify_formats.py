"""Libraries that load exports, to compare their logits with the run's probe.

A format names its library: ``TransformersConsumer`` loads it in this process,
``ProcessConsumer`` in a subprocess of this Python if it has the library, or of the one named by an
environment variable. All have a time limit.
"""

import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dist_peft.export import verify_consumer
from dist_peft.export.time_limit import VerificationSkipped, enforce_time_limit
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Probe, check_generation, choose_model_class

__all__ = [
    "ADAPTER",
    "Consumer",
    "ConsumerRequest",
    "ProcessConsumer",
    "TransformersConsumer",
]

log = logging.getLogger("dist_peft")

ADAPTER = "adapter"
"""Subdirectory of an export with the adapter for the exported base."""


@dataclass(frozen=True)
class ConsumerRequest:
    """An export to be loaded, and the tokens to compute logits for.

    Attributes:
        path: the exported directory, or the file of a gguf.
        probe: the run's probe, with the tokens.
        dtype: compute type for ``transformers``.
        seconds: time limit.
        trust_remote_code: run code that is stored in ``path``.
    """

    path: Path
    probe: Probe
    dtype: torch.dtype
    seconds: float = 600.0
    trust_remote_code: bool = False


class Consumer(Protocol):
    """A library that loads exports."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Modules that it consists of, the library itself first."""

    @property
    def variable(self) -> str:
        """Environment variable that may name a Python with the library; empty: there is none."""

    def list_missing(self) -> tuple[str, ...]:
        """Return those of ``libraries`` that are not installed here, nor in that Python."""

    def compute_logits(self, request: ConsumerRequest) -> tuple[str, Tensor]:
        """Load ``request.path`` and return the library's version and the logits of the probe.

        Raises:
            VerificationSkipped: the library is not installed, or exceeded the time limit.
            VerificationError: it cannot load the export.
        """


@dataclass(frozen=True)
class TransformersConsumer:
    """``transformers`` in this process.

    Attributes:
        needs: modules that it needs for the format.
        reports: distributions whose versions are reported with its own.
        settings: further arguments of ``from_pretrained``.
        quantization: class of ``transformers`` and its arguments that replace the configuration
            in the files.
        file_argument: argument of ``from_pretrained`` that names the file, where the export is
            one.
        prepare: changes the loaded model before an adapter is loaded; returns a note on it for
            the report.
        generates: whether the model must generate, too.
        variable: none, since it is in this process.
    """

    needs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantization: tuple[str, Mapping[str, Any]] | None = None
    file_argument: str | None = None
    prepare: Callable[[Any], str] | None = None
    generates: bool = True
    variable: str = ""

    @property
    def libraries(self) -> tuple[str, ...]:
        """``transformers``, then ``needs``."""
        return ("transformers", *self.needs)

    def list_missing(self) -> tuple[str, ...]:
        """Return those of ``needs`` that are not installed."""
        return tuple(module for module in self.needs if find_spec(module) is None)

    def compute_logits(self, request: ConsumerRequest) -> tuple[str, Tensor]:
        """Load and compute. See ``Consumer``."""
        with enforce_time_limit("loading it with transformers", request.seconds):
            return self._compute_logits(request)

    @torch.no_grad()
    def _compute_logits(self, request: ConsumerRequest) -> tuple[str, Tensor]:
        for module in self.list_missing():
            package = module.replace("_", "-")
            raise VerificationSkipped(f"{package} is not installed; pip install {package}")
        disable_progress_bar()
        path, options = request.path, self._make_options(request)
        if self.file_argument is not None:
            options[self.file_argument], path = path.name, path.parent
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a replaced configuration differs from the file's
            model: Any = choose_model_class(path).from_pretrained(path, **options)
        note = "" if self.prepare is None else self.prepare(model)
        reported = ", ".join(f"{name} {version(name)}" for name in ("transformers", *self.reports))
        consumer = reported + note
        if (request.path / ADAPTER).is_dir():
            model.load_adapter(str(request.path / ADAPTER))
            consumer += f", peft {version('peft')}"
        ids = request.probe.input_ids
        logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
        if self.generates:
            check_generation(model, ids)
        return consumer, logits

    def _make_options(self, request: ConsumerRequest) -> dict[str, Any]:
        options: dict[str, Any] = {
            "dtype": request.dtype,
            "trust_remote_code": request.trust_remote_code,
            **self.settings,
        }
        if self.quantization is not None:
            name, arguments = self.quantization
            options["quantization_config"] = getattr(transformers, name)(**arguments)
        return options


@dataclass(frozen=True)
class ProcessConsumer:
    """A library in a subprocess, since its requirements may conflict with this environment's.

    Attributes:
        name: in messages.
        function: ``(model: Path, ids: list[int], *options: str)`` -> the library's version and
            logits ``[n, vocabulary]``, or of a classifier's several texts ``[B, classes]``. Its
            source is run by ``verify_consumer`` in the library's environment: it imports all that
            it needs, and nothing of this package.
        module: of the library.
        variable: environment variable that may name a Python that has the library; empty: it is
            part of this environment.
        install: how to install it.
        note: added to the line that is logged before it starts.
        options: further arguments of ``function``.
    """

    name: str
    function: Callable[..., tuple[str, Any]]
    module: str = "transformers"
    variable: str = ""
    install: str = ""
    note: str = ""
    options: tuple[str, ...] = ()

    @property
    def libraries(self) -> tuple[str, ...]:
        """The module."""
        return (self.module,)

    def list_missing(self) -> tuple[str, ...]:
        """Return the module where no Python has it; one that the variable names is not asked."""
        return () if self.find_python() else self.libraries

    def find_python(self) -> str | None:
        """Return a Python executable that has the library, or None."""
        named = os.environ.get(self.variable) if self.variable else None
        return named or (sys.executable if find_spec(self.module) else None)

    def compute_logits(self, request: ConsumerRequest) -> tuple[str, Tensor]:
        """Load and compute in a subprocess, which is killed when the time is up."""
        out, seconds, python = request.path, request.seconds, self.find_python()
        if self.variable:
            minutes = seconds / 60
            log.info(
                "loading %s with %s, for at most %g minutes%s", out, self.module, minutes, self.note
            )
        if python is None:
            raise VerificationSkipped(
                f"{self.module.replace('_', '-')} is not installed; {self.install}, here or in a "
                f"separate environment, and set {self.variable} to its Python"
            )
        ids = request.probe.input_ids
        assert verify_consumer.__file__ is not None
        with tempfile.TemporaryDirectory() as scratch:
            script, logits = Path(scratch) / "consumer.py", Path(scratch) / "logits.npy"
            script.write_text(inspect.getsource(self.function))
            command = [python, verify_consumer.__file__, str(script), self.function.__name__]
            command += [
                str(out.resolve()),
                str(logits),
                json.dumps((ids[0] if len(ids) == 1 else ids).tolist()),
            ]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = _run_with_timeout(
                [*command, *self.options], scratch, environment, self.name, seconds
            )
            if done.returncode < 0:
                raise VerificationSkipped(
                    f"the process of {self.name} was killed by signal {-done.returncode}"
                    + (", as the system does when out of memory" if done.returncode == -9 else "")
                )
            if done.returncode:
                raise VerificationError(f"{self.name} cannot load {out}:\n{done.stderr}")
            return done.stdout.strip().splitlines()[-1], _shape_logits(
                np.load(logits), request.probe
            )


def _shape_logits(logits: np.ndarray[Any, Any], probe: Probe) -> Tensor:
    """Logits of a script, ``[1, n, V]``, as the probe has them; a classifier's are ``[B, V]``."""
    found = torch.from_numpy(logits)
    return found[0] if probe.trained.dim() == 2 and found.shape[0] == 1 else found


def _run_with_timeout(
    command: list[str], scratch: str, environment: dict[str, str], consumer: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a command; kill it and its children, such as compilers, when the time is up."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=scratch,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise VerificationSkipped(
            f"{consumer} did not load it within {seconds / 60:g} minutes (it may compile kernels "
            "on its first run); raise the limit with --verify-minutes"
        ) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
