"""Inputs of a merged model's linears on sample texts, and the factors that AWQ folds into weights.

The model is written merged, unpacked, into a temporary directory next to the output, and its
forward pass runs on the texts with weights that are read as they are used
(``model.streamed_weights``). When a block has run, its groups are searched
(``export.formats.awq_search``) and its inputs dropped::

    weights before          linears that read its output
    input_layernorm         self_attn.q_proj, k_proj, v_proj
    self_attn.v_proj        self_attn.o_proj, if the heads of values are those of queries
    post_attention_layernorm mlp.gate_proj, up_proj
    mlp.up_proj             mlp.down_proj

A group is searched where the block computes so, which is tried with the samples: the linears read
the norm's very output and nothing else does, the norm multiplies by its weight, ``down_proj`` reads
``act(gate) * up``. Blocks of other kinds keep plain rounding.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import keep_freed_memory
from dist_peft.export.formats.awq_search import FoundFactors, InputSample, search_factors
from dist_peft.export.formats.export_spec import ExportSpec
from dist_peft.model.hub import load_tokenizer
from dist_peft.model.skeleton import Skeleton, build_skeleton
from dist_peft.model.streamed_weights import stream_weights
from dist_peft.quant.affine import AffineCodec
from dist_peft.store.reader import RowReader

__all__ = ["CalibratedFactors", "read_calibration_tokens", "search_model_factors"]

log = logging.getLogger("dist_peft")

SEQUENCES, TOKENS = 16, 512
"""Sequences of the text, and tokens of one."""

_SAMPLED = 1024
"""Rows of a tensor that the error is measured on."""


@dataclass(frozen=True)
class _Group:
    """Linears of a block that read the output of ``before``; paths within the block."""

    before: str
    linears: tuple[str, ...]


_NORM_GROUPS = (
    _Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    _Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
_VALUES = _Group("self_attn.v_proj", ("self_attn.o_proj",))
_PRODUCTS = _Group("mlp.up_proj", ("mlp.down_proj",))


@dataclass
class CalibratedFactors:
    """Factors by full name of a parameter.

    Attributes:
        columns: weight of a linear -> factors of its columns, float32 ``[in]``.
        rows: weight or bias that computes the inputs -> divisors of its rows, float32 ``[n]``.
        errors: of each group, that of the products on the samples and that of plain rounding.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    errors: list[tuple[float, float]] = field(default_factory=list)

    def add(self, block: str, group: _Group, found: FoundFactors) -> None:
        for linear in group.linears:
            self.columns[f"{block}.{linear}.weight"] = found.factors
        for own in ("weight", "bias"):
            self.rows[f"{block}.{group.before}.{own}"] = found.factors
        self.errors.append((found.error, found.plain_error))

    def scale_rows(self, path: str, rows: Tensor, first: int) -> Tensor:
        """Return ``rows`` of a parameter, from row ``first``, with its factors in them."""
        columns, divisors = self.columns.get(path), self.rows.get(path)
        if columns is None and divisors is None:
            return rows
        scaled = rows.float() if columns is None else rows.float() * columns
        if divisors is not None:
            own = divisors[first : first + len(rows)]
            scaled = scaled / own.view(-1, *[1] * (scaled.dim() - 1))
        return scaled

    def describe(self) -> str:
        """Return the number of groups and their mean errors."""
        found, plain = (sum(e[i] for e in self.errors) / len(self.errors) for i in (0, 1))
        return f"{len(self.errors)} groups, error of products {found:.2%}, of plain {plain:.2%}"


def read_calibration_tokens(file: Path, job: ExportSpec, limit: int | None) -> Tensor:
    """Return sequences of a text file, long ``[n, tokens]``.

    Args:
        file: UTF-8 text, or ``.jsonl`` with a ``text`` in each line.
        job: whose tokenizer is used.
        limit: longest sequence of the model.

    Raises:
        UserError: the file cannot be read or is shorter than one sequence.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            lines = [line for line in text.splitlines() if line.strip()]
            text = "\n".join(str(json.loads(line)["text"]) for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--calibration {file} cannot be read: {error}") from None
    kept = job.adapter_dir if (job.adapter_dir / "tokenizer.json").is_file() else job.directory
    tokenizer = load_tokenizer(kept, job.base.trust_remote_code)
    tokens = min(TOKENS, limit or TOKENS)
    wanted = SEQUENCES * tokens
    encoded = tokenizer(text[: 16 * wanted], add_special_tokens=False, verbose=False)
    ids = encoded.input_ids[:wanted]
    if len(ids) < tokens:
        raise UserError(
            f"--calibration {file} has {len(ids)} tokens, less than one sequence of {tokens}; give "
            "a longer text"
        )
    count = len(ids) // tokens
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


@torch.no_grad()
def search_model_factors(
    job: ExportSpec, merged: Path, file: Path, codec: AffineCodec
) -> CalibratedFactors:
    """Search the factors of the model in directory ``merged`` on the text of ``file``.

    Raises:
        UserError: the text is too short, or no block has a group that is known.
    """
    settings = {"path": str(merged), "quant": None, "attention": "auto"}
    base = job.base.model_copy(update=settings)
    skeleton = build_skeleton(base, merged)
    ids = read_calibration_tokens(file, job, skeleton.max_positions)
    found = CalibratedFactors()
    with RowReader(skeleton.index) as reader, keep_freed_memory():
        sources = _map_weights(skeleton)

        def read_weight(path: str) -> Tensor:
            return reader.read_rows(sources[path]).float()

        with (
            stream_weights(skeleton.model, skeleton.blocks, reader),
            _searching(skeleton, codec, read_weight, found),
        ):
            skeleton.model(input_ids=ids, use_cache=False)
    if not found.errors:
        raise UserError(
            f"--calibration: {type(skeleton.model).__name__} has no block that AWQ's factors fit "
            "(norms before attention and MLP as in Llama, with linears of the same names); leave "
            "it out, and weights are rounded to nearest"
        )
    log.info("calibrated on %d tokens: %s", ids.numel(), found.describe())
    return found


def _map_weights(skeleton: Skeleton) -> dict[str, str]:
    """Return full name of a linear's weight -> tensor in the files."""
    return {
        f"{path}.weight": module.source
        for path, module in skeleton.model.named_modules()
        if isinstance(getattr(module, "source", None), str)
    }


@contextmanager
def _searching(
    skeleton: Skeleton,
    codec: AffineCodec,
    read_weight: Callable[[str], Tensor],
    found: CalibratedFactors,
) -> Iterator[None]:
    """Search the groups of each block when it has run."""
    paths = {id(module): path for path, module in skeleton.model.named_modules()}
    handles = []
    try:
        for block in skeleton.blocks:
            record = _BlockRecord(block)
            handles += record.handles

            def search(
                module: nn.Module, args: Any, output: Any, record: _BlockRecord = record
            ) -> None:
                path = paths[id(module)]
                for group, inputs in record.list_groups():
                    weights = [read_weight(f"{path}.{linear}.weight") for linear in group.linears]
                    found.add(path, group, search_factors(weights, inputs, codec))
                record.clear()

            handles.append(block.register_forward_hook(search))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockRecord:
    """Inputs and outputs of the parts of a block in its last forward pass."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.norm_weights: dict[str, Tensor] = {}
        self.handles = []
        for path, module in block.named_modules():
            if path:
                self.handles.append(
                    module.register_forward_hook(self._make_hook(path), with_kwargs=True)
                )

    def _make_hook(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            read = [*args, *keywords.values()]
            if read and isinstance(read[0], Tensor):
                self.inputs[path] = read[0]
            if isinstance(output, Tensor):
                self.outputs[path] = output
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1 and not weight.is_meta:
                self.norm_weights[path] = weight.detach()

        return keep

    def clear(self) -> None:
        """Drop what was recorded."""
        for kept in (self.inputs, self.outputs, self.norm_weights):
            kept.clear()

    def list_groups(self) -> list[tuple[_Group, InputSample]]:
        """Return the groups that this block has, with their inputs."""
        groups = [group for group in _NORM_GROUPS if self._is_norm_group(group)]
        if self._has_own_values():
            groups.append(_VALUES)
        if self._multiplies_up():
            groups.append(_PRODUCTS)
        return [(group, _sample(self.inputs[group.linears[0]])) for group in groups]

    def _has(self, *paths: str) -> bool:
        return all(path in self.inputs and path in self.outputs for path in paths)

    def _is_norm_group(self, group: _Group) -> bool:
        if not self._has(group.before, *group.linears) or group.before not in self.norm_weights:
            return False
        output = self.outputs[group.before]
        around = {linear.rpartition(".")[0] for linear in group.linears}
        readers = {path for path, read in self.inputs.items() if read is output}
        return readers - around == set(group.linears) and self._multiplies(group.before)

    def _multiplies(self, path: str) -> bool:
        """Return whether a norm's output is proportional to its weight."""
        norm, weight = self.block.get_submodule(path), self.norm_weights[path]
        x = self.inputs[path][:1, :4].float()
        if [name for name, _ in norm.named_parameters() if name != "weight"]:
            return False  # a bias, too
        once, twice = (
            functional_call(norm, {"weight": factor * weight.float()}, (x,)) for factor in (1, 2)
        )
        return torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-6)

    def _has_own_values(self) -> bool:
        if not self._has("self_attn.v_proj", "self_attn.o_proj"):
            return False
        names = {path.rpartition(".")[2] for path in self.outputs}
        value, inner = self.outputs["self_attn.v_proj"], self.inputs["self_attn.o_proj"]
        return value.shape == inner.shape and "v_norm" not in names

    def _multiplies_up(self) -> bool:
        names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        activation = getattr(getattr(self.block, "mlp", None), "act_fn", None)
        if not self._has(*names) or activation is None:
            return False
        gate, up = (self.outputs[name][:1, :4].float() for name in names[:2])
        read = self.inputs["mlp.down_proj"][:1, :4].float()
        return torch.allclose(activation(gate) * up, read, rtol=2e-2, atol=1e-4)


def _sample(tensor: Tensor) -> InputSample:
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, len(rows) // _SAMPLED)
    return InputSample(rows[::step][:_SAMPLED].float(), rows.float().abs().mean(0))
