"""Load an adapter in PEFT's format with PEFT on the base and compare with the trained model.

The base is the model of plain ``transformers`` with the weights that training had: linears of the
blocks dequantized (for PiSSA and LoftQ without subtracting the initial factors, which their PEFT
format does itself), everything else in the compute type.
"""

import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.config.run import BaseConfig
from dist_peft.export.base_rows import iterate_base_rows
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Comparison, Probe, compare_logits
from dist_peft.model.model_class import choose_auto_class
from dist_peft.model.skeleton import parse_torch_dtype

__all__ = [
    "compute_adapter_logits",
    "compute_base_logits",
    "load_trained_base",
    "save_trained_base",
    "verify_adapter",
]


@torch.no_grad()
def verify_adapter(
    base: BaseConfig, directory: Path, trained: Path, out: Path, probe: Probe
) -> tuple[str, Comparison]:
    """Apply the exported adapter ``out`` with PEFT and compare its logits with the probe.

    Args:
        base: the run's base configuration.
        directory: directory of the base's files.
        trained: directory of the run's adapter, whose metadata lists the labels of a head.
        out: directory of the exported adapter.
        probe: the run's probe.

    Returns:
        PEFT's version and the comparison with the trained model.

    Raises:
        NotVerified: PEFT is not installed, or ``transformers`` has no such model.
    """
    if find_spec("peft") is None:
        raise VerificationSkipped("peft is not installed; pip install peft")
    labels = read_adapter_metadata(trained).get("labels", ())
    logits = compute_adapter_logits(base, directory, labels, out, probe)
    name = f"peft {version('peft')}, transformers {version('transformers')}"
    return name, compare_logits(logits, probe)


@torch.no_grad()
def compute_adapter_logits(
    base: BaseConfig,
    directory: Path,
    labels: Any,
    out: Path,
    probe: Probe,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the float32 logits of the probe's tokens by PEFT, which has to be installed.

    Args:
        base, directory, out, probe: see ``verify_adapter``.
        labels: of a classifier; empty for a language model.
        dtype: type to compute in, with the weights that training had; default: the run's.

    Raises:
        VerificationSkipped: ``transformers`` has no such model.
    """
    from peft import PeftModel

    model = load_trained_base(base, directory, labels)
    if dtype is not None:
        model = model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about a rank_pattern without a module
        adapted: Any = PeftModel.from_pretrained(model, str(out)).eval()
    found: Tensor = adapted(
        input_ids=probe.input_ids, use_cache="prefix" in _describe_adapter_kind(adapted)
    ).logits.float()
    if (extra := found.shape[1] - probe.trained.shape[1]) > 0 and not labels:
        found = found[:, extra:]  # drop the positions of virtual tokens
    return found


@torch.no_grad()
def compute_base_logits(
    base: BaseConfig, directory: Path, labels: Any, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the float32 logits of ``ids`` [B, S] by the base that training saw, without an
    adapter, computed in ``dtype``.

    Raises:
        VerificationSkipped: ``transformers`` has no such model.
    """
    model: Any = load_trained_base(base, directory, labels).to(dtype)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _describe_adapter_kind(adapted: Any) -> str:
    return str(adapted.active_peft_config.peft_type.value).lower()


@torch.no_grad()
def load_trained_base(base: BaseConfig, directory: Path, labels: Any) -> nn.Module:
    """Return the model of plain ``transformers`` with the weights that training had, without any
    adapter: linears of the blocks dequantized, everything else in the compute type.

    Args:
        base: the run's base configuration.
        directory: directory of the base's files.
        labels: of a classifier; empty for a language model.

    Raises:
        VerificationSkipped: ``transformers`` has no such model.
    """
    model = _build_plain_model(base, directory, labels)
    _fill_plain_model(model, base, directory, labels)
    return model


def save_trained_base(base: BaseConfig, directory: Path, out: Path) -> None:
    """Write the model of ``load_trained_base`` to ``out``, as ``transformers`` saves it.

    Raises:
        VerificationSkipped: ``transformers`` has no such model, or the disk is full.
    """
    model: Any = load_trained_base(base, directory, ())
    try:
        model.save_pretrained(out)
    except OSError as error:
        raise VerificationSkipped(f"the dequantized base cannot be written: {error}") from None


def _build_plain_model(base: BaseConfig, directory: Path, labels: Any) -> nn.Module:
    """Build the model of plain ``transformers`` with random weights."""
    trust = base.trust_remote_code
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto = choose_auto_class({**config.to_dict(), "architectures": None})
    if labels:
        auto, config.num_labels = AutoModelForSequenceClassification, len(labels)
    dtype = parse_torch_dtype(base.compute_dtype)
    model: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
    return model.eval()


def _fill_plain_model(model: nn.Module, base: BaseConfig, directory: Path, labels: Any) -> None:
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, rows, span in iterate_base_rows(base, directory, labels):
        target = own.get(path, own.get(path.removesuffix(".weight")))
        if target is None and not path.startswith("lm_head."):  # stored copy of a tied head
            raise VerificationSkipped(f"the model of plain transformers has no {path}")
        if target is not None:
            flat = target.view(-1, *rows.shape[1:]) if rows.dim() > 1 else target.view(-1)
            flat[span.slice] = rows.to(target.dtype)
