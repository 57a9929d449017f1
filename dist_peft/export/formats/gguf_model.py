"""Map a model's configuration and tensor names to GGUF, per architecture.

llama.cpp applies rotary embeddings to adjacent pairs of a head's dimensions, ``transformers`` to
its two halves. For families whose llama.cpp graph does the former (``gguf_families``), rows of q
and k are interleaved within each head::

    transformers   row  h, (half, i)        llama.cpp   row  h, (i, half)

which moves whole rows and does not change their quantization groups.

A projection of all experts of a layer is one tensor ``[experts, out, in]``, such as
``blk.0.ffn_gate_exps.weight``. Rows of ``gate_proj`` and of ``up_proj``, which some families
have in one matrix, go to two tensors::

    first half, second half     most families
    even, odd                   gpt-oss

Routers are in float32. Gemma's norms multiply by ``1 + w``, of which the file has the sum. Of a
model with towers the text model is written.
"""

import re
from typing import Any, NamedTuple

import gguf
from torch import Tensor, nn

from dist_peft.core.errors import UserError
from dist_peft.export.base_weights import BaseWeight
from dist_peft.export.formats.gguf_families import FAMILIES, find_family_obstacle
from dist_peft.export.formats.gguf_metadata import (
    add_model_metadata,
    compute_rope_factors,
    find_rope_obstacle,
    get_head_dim,
)
from dist_peft.model.experts import ExpertStack
from dist_peft.model.skeleton import Skeleton
from dist_peft.model.text_model import find_text_model

__all__ = ["GgufModelLayout", "RowTarget"]

_PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""Name of an expert's projection -> llama.cpp's."""

_OTHER_NAMES = (
    (r"layers\.(\d+)\..*\.e_score_correction_bias", r"blk.\1.exp_probs_b.bias"),
    (r"layers\.(\d+)\.block_sparse_moe\.router\.weight", r"blk.\1.ffn_gate_inp.weight"),
)
"""Paths that the gguf package has no name for."""

_FUSED = {r"layers\.(\d+)\.shared_mlp\.input_linear\.weight": "blk.{}.ffn_{}_shexp.weight"}
"""Linears whose first half is a gate, and the names of the two tensors."""


class RowTarget(NamedTuple):
    """Rows of a weight that are rows of one tensor of the file.

    Attributes:
        name: of the tensor.
        rows: which of the weight's; of an expert's bias, numbers are rows.
        expert: number of the part of the tensor that they are; None: the tensor is no stack.
    """

    name: str
    rows: slice = slice(None)
    expert: int | None = None


def _find_text_prefix(model: nn.Module) -> str:
    """Return the path of the text model in one with towers, and a dot; empty: it has none."""
    text = find_text_model(model)
    paths = {id(module): path for path, module in model.named_modules()}
    return "" if text is model else f"{paths[id(text)]}."


class GgufModelLayout:
    """Tensor names, metadata and row order of one model.

    Raises:
        UserError: an unsupported architecture or rotary scaling.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        config = skeleton.model_config.get_text_config()
        if config.model_type not in FAMILIES:
            raise UserError(
                f"gguf is written for {', '.join(FAMILIES)}, not for {config.model_type}; "
                "merge the run (hf-bf16) and use llama.cpp's converter"
            )
        self._text = _find_text_prefix(skeleton.model)
        reason = find_family_obstacle(config, has_towers=bool(self._text))
        if reason := reason or find_rope_obstacle(config):
            raise UserError(f"gguf is not written: {reason}; merge the run (hf-bf16)")
        self.config: Any = config
        self.family = FAMILIES[config.model_type]
        self.tied = skeleton.tied
        self._children = {name for name, _ in skeleton.model.named_children()}
        self.architecture = self.family.architecture
        self._names = gguf.get_tensor_name_map(self.architecture, config.num_hidden_layers)

    def list_targets(self, weight: BaseWeight) -> list[RowTarget]:
        """Return the tensors of the file that have rows of ``weight``; none if llama.cpp does not
        store it.

        Raises:
            UserError: the model needs the tensor, but GGUF has no name for it.
        """
        if self.tied and weight.path.startswith("lm_head."):
            return []
        path = weight.path
        if self._text:
            if not path.startswith((self._text, "lm_head.")):
                return []  # a tower: llama.cpp has files of their own for these
            path = path.replace(self._text, "model.", 1)
        layer = re.search(r"layers\.(\d+)\.", path)
        if layer is not None and int(layer[1]) >= self.config.num_hidden_layers:
            return []  # predicts further tokens; the model has no such layer
        if targets := self._list_expert_targets(weight, path):
            return targets
        for pattern, pair in _FUSED.items():
            if found := re.search(pattern, path):
                half = weight.num_rows // 2
                gate, up = (pair.format(found[1], part) for part in ("gate", "up"))
                return [RowTarget(gate, slice(half)), RowTarget(up, slice(half, None))]
        name = self.map_path(path)
        if name is not None:
            return [RowTarget(name)]
        if path.endswith("rotary_emb.inv_freq") or path.split(".")[0] not in self._children:
            return []  # computed, or a tower next to a model that is the text model
        raise UserError(f"gguf has no name for tensor {weight.name} of {self.architecture.name}")

    def _list_expert_targets(self, weight: BaseWeight, path: str) -> list[RowTarget]:
        """Return the targets of an expert's weight, or of the biases of all experts."""
        found = re.search(
            r"layers\.(\d+)\..*experts\.(?:\w+\.)*?(\w+_proj)(_bias)?(\.weight)?$", path
        )
        if found is None or not (weight.is_expert or found[3]):
            return []
        layer, projection, kind = found[1], found[2], "bias" if found[3] else "weight"
        expert = None
        if (stack := weight.linear) is not None:
            assert isinstance(stack, ExpertStack)
            expert, first = divmod(weight.first, stack.out_features)
            if weight.num_rows < stack.out_features:  # a matrix of its own
                projection = "up_proj" if first else "gate_proj"
        if projection != "gate_up_proj":
            name = f"blk.{layer}.ffn_{_PROJECTIONS[projection]}_exps.{kind}"
            return [RowTarget(name, expert=expert)]
        gate, up = (f"blk.{layer}.ffn_{part}_exps.{kind}" for part in ("gate", "up"))
        if self.family.alternates:
            return [
                RowTarget(gate, slice(0, None, 2), expert),
                RowTarget(up, slice(1, None, 2), expert),
            ]
        half = weight.num_rows // 2
        return [RowTarget(gate, slice(half), expert), RowTarget(up, slice(half, None), expert)]

    def map_path(self, path: str) -> str | None:
        """Return the GGUF name of parameter ``path``, which ends in .weight or .bias, or None."""
        for pattern, other in _OTHER_NAMES:
            if found := re.search(pattern, path):
                return found.expand(other)
        name: str | None = self._names.get_name(path, try_suffixes=(".weight", ".bias"))
        return f"{name}.weight" if name is not None and name.endswith("attn_sinks") else name

    def get_row_multiple(self, weight: BaseWeight) -> int:
        """Return the number of rows that a chunk must be a multiple of to be reordered."""
        return get_head_dim(self.config) if self._is_interleaved(weight.path) else 1

    def reorder_rows(self, weight: BaseWeight, rows: Tensor) -> Tensor:
        """Return rows of whole heads in llama.cpp's order."""
        return self.reorder_path_rows(weight.path, rows)

    def shift_rows(self, path: str, rows: Tensor) -> Tensor:
        """Return rows of the parameter ``path`` as the file has them: Gemma's norms plus one."""
        is_norm = self.family.shifts_norms and path.endswith("norm.weight")
        return rows + 1 if is_norm else rows

    def reorder_path_rows(self, path: str, rows: Tensor) -> Tensor:
        """Do the same for the parameter ``path``."""
        if not self._is_interleaved(path):
            return rows
        heads = rows.reshape(-1, 2, get_head_dim(self.config) // 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    def restore_path_rows(self, path: str, rows: Tensor) -> Tensor:
        """Return rows in llama.cpp's order in that of ``transformers``: ``reorder_path_rows``,
        reversed."""
        if not self._is_interleaved(path):
            return rows
        heads = rows.reshape(-1, get_head_dim(self.config) // 2, 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    def _is_interleaved(self, path: str) -> bool:
        return self.family.reorders and path.split(".")[-2] in ("q_proj", "k_proj")

    def add_model_metadata(self, writer: gguf.GGUFWriter, name: str, file_type: int) -> None:
        """Add the hyperparameters of the model to a file's metadata."""
        add_model_metadata(writer, self.config, name, file_type)

    def compute_rope_factors(self) -> Tensor | None:
        """Return the divisors of the rotary frequencies, float32 [head_dim / 2], or None."""
        return compute_rope_factors(self.config)
