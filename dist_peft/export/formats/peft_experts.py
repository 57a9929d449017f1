"""``peft-experts``: LoRA on experts with two matrices for each expert and projection.

``transformers`` stacks the experts of a layer, and so does PEFT's adapter of a run
(``adapters.lora.expert_format``). vLLM (``FusedMoEWithLoRA``, unless a family is declared
``is_3d_moe_weight``) and SGLang read the names of a model whose experts are modules, as older
checkpoints have them; they are those of the base's files::

    model.layers.0.mlp.experts.3.gate_proj.weight                            in the base
    base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight    [r, in]
    base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_B.weight    [out, r]

The stack ``[G_e; U_e]`` has one ``A_e``, which both projections get, and each its rows of ``B_e``:
the change is the same. vLLM wants all three projections of every expert, so that one without an
adapter gets a ``B`` of zeros; and it reads neither ``rank_pattern`` nor ``alpha_pattern``, so that
factors of a smaller rank are filled up with zeros, and other scalings are multiplied into ``B``.
PEFT (0.21) turns such a directory back into stacks when it loads it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_peft.adapters.directory import (
    check_public_adapter,
    read_adapter_directory,
    write_adapter_directory,
)
from dist_peft.adapters.lora.expert_format import is_taken_for_experts
from dist_peft.adapters.lora.tensors import LoraTensors, build_peft_key, parse_lora_tensors
from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.errors import UserError
from dist_peft.export.formats.export_format import PlannedExport
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.peft_adapter import PeftExport
from dist_peft.export.model_directory import WriteResult, copy_tokenizer_files
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verify import Comparison
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.expert_kinds import STACK_NAMES
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.store.publish import publish_directory

__all__ = ["PeftExpertsExport", "split_experts"]


class PeftExpertsExport(PeftExport):
    """LoRA on experts under the names of single experts."""

    name = "peft-experts"
    keeps = "LoRA on experts, each expert's factors apart"
    loads_with = "vLLM, SGLang, PEFT"
    reads_base = True
    verification_limit = "linears that are no experts but named so"
    classifier_limit = "its readers have language models alone"

    def find_obstacle(self, run: PlannedExport, options: Mapping[str, Any]) -> str | None:
        if reason := super().find_obstacle(run, options):
            return reason
        if run.config.adapter.kind != "lora":
            return f"the format holds LoRA, not adapter.kind {run.config.adapter.kind}"
        for key in ("use_dora", "embeddings", "train_router"):
            if getattr(run.config.adapter, key, False):
                return f"the format holds LoRA of linears and experts, without adapter.{key}"
        return _find_base_obstacle(run.skeleton)

    def write_export(self, job: ExportSpec) -> ExportResult:
        job.check_output()
        public = read_adapter_directory(job.adapter_dir)
        check_public_adapter(public)
        if public.config.get("peft_type") != "LORA" or public.head is not None:
            kind = public.config.get("peft_type") or "AdapterHub's"
            raise UserError(f"format {self.name} holds LoRA, not an adapter of type {kind}")
        skeleton = build_skeleton(job.base, job.directory)
        if reason := _find_base_obstacle(skeleton):
            raise UserError(f"format {self.name} cannot hold {job.adapter_dir}: {reason}")
        written = split_experts(public, skeleton)
        with publish_directory(job.out) as out:
            write_adapter_directory(out, written, read_adapter_metadata(job.adapter_dir))
            copy_tokenizer_files(job.adapter_dir, out)
        size = sum(path.stat().st_size for path in job.out.glob("*.safetensors"))
        counts = WriteResult(len(written.tensors), 0, 0, size)
        return ExportResult(counts, job.out, "PEFT adapter, experts apart", exact=True)

    def verify_export(self, job: ExportSpec, request: ConsumerRequest) -> tuple[str, Comparison]:
        public = read_adapter_directory(job.adapter_dir, values=False)
        named = {key.removesuffix(".lora_A.weight") for key in public.tensors}
        if shared := sorted(path for path in named if is_taken_for_experts(path)):
            raise VerificationSkipped(
                f"PEFT takes {shared[0].removeprefix('base_model.model.')}, which is no expert, "
                "for one by its name"
            )
        return self.verify_with_peft(job, request)


def _find_base_obstacle(skeleton: Skeleton) -> str | None:
    """Return why a base's experts have no names of their own; None: they have."""
    stacks = [m for m in skeleton.model.modules() if isinstance(m, ExpertStack)]
    if not stacks:
        return "the base has no experts; --format peft is the same adapter"
    if any(len(stack.pieces) < stack.experts for stack in stacks):
        return (
            "the base's files have the experts stacked, without a name for each; servers read "
            "--format peft for such a family"
        )
    return None


def split_experts(public: PublicAdapter, skeleton: Skeleton) -> PublicAdapter:
    """Return a LoRA adapter with the experts' factors apart, of one rank and one scaling.

    Args:
        public: LoRA as PEFT stores it, checked.
        skeleton: model of the base, whose stacks of experts know their tensors in the files.

    Raises:
        UserError: DoRA, or LoRA on an embedding.
    """
    modules = parse_lora_tensors(public)
    for path, module in modules.items():
        if module.magnitude is not None or module.is_embedding:
            kind = "DoRA's magnitudes" if module.magnitude is not None else "an embedding"
            raise UserError(f"format peft-experts holds neither: {path} has {kind}; use peft")
    stacks = {p: m for p, m in skeleton.model.named_modules() if isinstance(m, ExpertStack)}
    rank = max(module.A.shape[0] // module.experts for module in modules.values())
    scaling = next(iter(modules.values())).scaling
    tensors: dict[str, Tensor] = {}
    for path, A, B, own_scaling in _iterate_matrices(modules, stacks):
        filled_A, filled_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
        filled_A[: A.shape[0]], filled_B[:, : B.shape[1]] = A, B
        if own_scaling != scaling:
            filled_B *= own_scaling / scaling
        tensors[build_peft_key(path, "lora_A")] = filled_A
        tensors[build_peft_key(path, "lora_B")] = filled_B
    config = {
        **public.config,
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
        "target_parameters": None,
    }
    return replace(public, config=config, tensors=tensors)


def _iterate_matrices(
    modules: Mapping[str, LoraTensors], stacks: Mapping[str, ExpertStack]
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield path, ``A`` ``[r, in]``, ``B`` ``[out, r]`` and scaling of each linear and expert."""
    for path, module in modules.items():
        if path not in stacks:
            yield path, module.A, module.B, module.scaling
    for owner in sorted({path.rpartition(".")[0] for path in modules if path in stacks}):
        for own in (name for name in STACK_NAMES if f"{owner}.{name}" in stacks):
            stack, adapted = stacks[f"{owner}.{own}"], modules.get(f"{owner}.{own}")
            prefix = "model." if owner.startswith("model.") else ""
            each = len(stack.pieces) // stack.experts
            rows = stack.out_features // each
            for number, piece in enumerate(stack.pieces):
                name = prefix + piece.name.removeprefix("model.").removesuffix(".weight")
                if adapted is None:
                    A, B, scaling = torch.zeros(1, stack.in_features), torch.zeros(rows, 1), 0.0
                else:
                    expert, part = divmod(number, each)
                    A = adapted.A.view(stack.experts, -1, stack.in_features)[expert]
                    B = adapted.B.view(stack.experts, each, rows, -1)[expert, part]
                    scaling = adapted.scaling
                yield name, A, B, scaling
