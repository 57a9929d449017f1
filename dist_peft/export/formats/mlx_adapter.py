"""``mlx-adapter``: a LoRA adapter that mlx-lm applies to the base (``--adapter-path``).

::

    adapter_config.json    {"fine_tune_type": "lora", "num_layers": -1,
                            "lora_parameters": {"rank", "scale", "dropout", "keys"}}
    adapters.safetensors   PATH.lora_a [in, r], PATH.lora_b [r, out]: transposed

mlx-lm gives a linear whose name within its layer is in ``keys`` a LoRA in every layer, of one rank.
So factors of a smaller rank are padded with zeros, and a linear that is not adapted in one layer
keeps mlx-lm's own ``lora_b`` of zeros there, which changes nothing.

mlx-lm applies the adapter to the base's own files. It does not load a base quantized as in
training: for the comparison a temporary directory has the dequantized weights in the compute type.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.export.formats.export_format import ExportFormat, PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.plain_lora import (
    LinearFactors,
    find_plain_lora_obstacle,
    read_plain_lora,
)
from dist_peft.export.model_directory import WriteResult, copy_tokenizer_files
from dist_peft.export.verify import Comparison, compare_logits
from dist_peft.export.verify_adapter import save_trained_base
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, ProcessConsumer
from dist_peft.model.hub import public_base_name, resolve_base_directory
from dist_peft.store.publish import publish_directory
from dist_peft.store.writer import write_atomically

__all__ = ["MlxAdapterExport", "convert_to_mlx", "run_mlx_adapter"]


def run_mlx_adapter(model: Path, ids: list[int], base: str) -> tuple[str, Any]:
    """Runs in the environment of mlx-lm (``export.verify_consumer``)."""
    from importlib.metadata import version

    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    loaded = load_adapters(load_model(Path(base))[0], str(model))
    loaded.eval()
    logits = loaded(mx.array([ids])).astype(mx.float32)
    return f"mlx-lm {version('mlx-lm')}", np.array(logits)[0]


_MLX_ADAPTER = ProcessConsumer(
    "mlx",
    run_mlx_adapter,
    "mlx_lm",
    "DIST_PEFT_MLX_PYTHON",
    "pip install 'mlx[cpu]' mlx-lm",
)


class MlxAdapterExport(ExportFormat):
    """mlx-lm's adapter directory."""

    name = "mlx-adapter"
    keeps = "LoRA of linears; QA-LoRA as plain LoRA"
    loads_with = "mlx-lm"
    reads_base = False
    classifier_limit = "its readers have language models alone"

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "adapter"

    def find_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if reason := super().find_obstacle(run, options):
            return reason
        if reason := find_plain_lora_obstacle(run.config.adapter, run.skeleton.model):
            return reason
        return None

    def write_export(self, job: ExportSpec) -> ExportResult:
        job.check_output()
        factors = read_plain_lora(job.adapter_dir, self.name)
        tensors, settings = convert_to_mlx(factors)
        config = {"model": public_base_name(job.base), **settings}
        with publish_directory(job.out) as out:
            write_atomically(out / "adapters.safetensors", save(tensors, {"format": "mlx"}))
            write_atomically(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")
            copy_tokenizer_files(job.adapter_dir, out)
        size = (job.out / "adapters.safetensors").stat().st_size
        counts = WriteResult(len(tensors), 0, 0, size)
        return ExportResult(counts, job.out, "LoRA of mlx-lm", exact=True)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return (_MLX_ADAPTER,)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        base = resolve_base_directory(job.base).resolve()
        if job.base.quant is None or _MLX_ADAPTER.find_python() is None:
            name, logits = replace(_MLX_ADAPTER, options=(str(base),)).compute_logits(request)
            return name, compare_logits(logits, request.probe)
        with tempfile.TemporaryDirectory() as scratch:
            save_trained_base(job.base, base, Path(scratch))
            name, logits = replace(_MLX_ADAPTER, options=(scratch,)).compute_logits(request)
        return f"{name}, base dequantized", compare_logits(logits, request.probe)


def convert_to_mlx(
    factors: Mapping[str, LinearFactors],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of ``adapters.safetensors`` and the settings of the configuration."""
    rank = max(one.rank for one in factors.values())
    scales = {one.scaling for one in factors.values()}
    folded = len(scales) > 1
    tensors: dict[str, Tensor] = {}
    for path, one in factors.items():
        missing = rank - one.rank
        B = one.scaled_B if folded else one.B
        tensors[f"{path}.lora_a"] = functional.pad(one.A.T, (0, missing)).contiguous()
        tensors[f"{path}.lora_b"] = functional.pad(B.T, (0, 0, 0, missing)).contiguous()
    keys = sorted({re.sub(r"^.*\blayers\.\d+\.", "", path) for path in factors})
    parameters = {
        "rank": rank,
        "scale": 1.0 if folded else scales.pop(),
        "dropout": 0.0,
        "keys": keys,
    }
    return tensors, {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
