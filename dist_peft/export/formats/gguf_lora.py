"""``gguf-lora``: a LoRA adapter that llama.cpp applies to a GGUF file of the base.

::

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    NAME.weight.lora_a  [r, in]      NAME as in the base's file, such as blk.0.attn_q
    NAME.weight.lora_b  [out, r]     rows in llama.cpp's order, as those of the weight

llama.cpp adds ``alpha / r * B A x``, and ``B A x`` where alpha is 0: so is an adapter written whose
scaling differs from module to module. The file is written by the ``gguf`` package.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_peft.adapters.export_limits import ExportContent
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import ExportFormat, PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.gguf_format import find_layout_obstacle
from dist_peft.export.formats.plain_lora import (
    LinearFactors,
    find_plain_lora_obstacle,
    read_plain_lora,
)
from dist_peft.export.model_directory import WriteResult
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_formats import Consumer, ConsumerRequest, TransformersConsumer
from dist_peft.model.skeleton import build_skeleton
from dist_peft.store.publish import publish_directory

__all__ = ["LORA_FILE", "GgufLoraExport", "write_gguf_lora"]

LORA_FILE = "adapter.gguf"


class GgufLoraExport(ExportFormat):
    """llama.cpp's adapter file, in float32."""

    name = "gguf-lora"
    keeps = "LoRA of linears; QA-LoRA as plain LoRA"
    loads_with = "llama.cpp, Ollama"
    classifier_limit = "its readers have language models alone"
    loaded_share = 5.0
    """The base in the compute type, and twice in float32: as it is written, and in llama.cpp."""

    def get_content(self, options: Mapping[str, Any]) -> ExportContent:
        return "adapter"

    def find_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if reason := super().find_obstacle(run, options):
            return reason
        if reason := find_plain_lora_obstacle(run.config.adapter, run.skeleton.model):
            return reason
        return find_layout_obstacle(run)

    def write_export(self, job: ExportSpec) -> ExportResult:
        if find_spec("gguf") is None:
            raise UserError(
                "format gguf-lora needs the gguf package; pip install 'dist_peft[export]'"
            )
        from dist_peft.export.formats.gguf_model import GgufModelLayout

        job.check_output()
        factors = read_plain_lora(job.adapter_dir, self.name)
        layout = GgufModelLayout(build_skeleton(job.base, job.directory))
        with publish_directory(job.out) as out:
            write_gguf_lora(out / LORA_FILE, layout, factors, job.directory.name)
        size = (job.out / LORA_FILE).stat().st_size
        counts = WriteResult(2 * len(factors), 0, 0, size)
        return ExportResult(counts, job.out / LORA_FILE, "LoRA of llama.cpp", exact=True)

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        reader = TransformersConsumer(needs=("gguf",))
        if reader.list_missing():  # which writes the file, too
            return (reader,)
        from dist_peft.export.formats.gguf_lora_check import LLAMA_CPP_SERVER

        return (LLAMA_CPP_SERVER, reader)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        from dist_peft.export.formats.gguf_lora_check import verify_gguf_lora

        return verify_gguf_lora(job.base, job.directory, request)


def write_gguf_lora(
    file: Path, layout: Any, factors: Mapping[str, LinearFactors], base_name: str
) -> None:
    """Write the file.

    Args:
        layout: a ``GgufModelLayout``.
        factors: by the path of the linear in ``transformers``.

    Raises:
        UserError: llama.cpp has no such tensor.
    """
    import gguf

    names = {path: layout.map_path(f"{path}.weight") for path in factors}
    for path, name in names.items():
        if name is None or (layout.tied and path.startswith("lm_head")):
            raise UserError(f"a GGUF file of this base has no tensor of its own for {path}")
    alphas = {round(one.scaling * one.rank, 9) for one in factors.values()}
    folded = len(alphas) > 1
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout.architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0 if folded else alphas.pop())
    writer.add_name(f"LoRA of {base_name}")
    for path, one in factors.items():
        rows = layout.reorder_path_rows(f"{path}.weight", one.scaled_B if folded else one.B)
        writer.add_tensor(f"{names[path]}.lora_a", _to_array(one.A))
        writer.add_tensor(f"{names[path]}.lora_b", _to_array(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_array(tensor: Tensor) -> Any:
    return tensor.float().contiguous().numpy()
