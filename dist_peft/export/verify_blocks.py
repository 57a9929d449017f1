"""Verify an exported directory without loading it: its weights are read as its forward pass runs.

The model is built from the directory's own ``config.json`` and the names in its files, as a base is
built for training; its weights are the bytes of the export, decoded by this project's codecs
(``model.streamed_weights``). So a model of any size is compared on a host that could not hold it. A
consumer's own loader is not tried, nor ``generate``.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_peft.core.config.run import BaseConfig
from dist_peft.core.errors import UserError
from dist_peft.core.host_memory import keep_freed_memory
from dist_peft.export.time_limit import VerificationSkipped
from dist_peft.export.verdict import VerificationError
from dist_peft.export.verify import Comparison, Probe, compare_logits
from dist_peft.model.skeleton import build_skeleton
from dist_peft.model.streamed_weights import stream_weights
from dist_peft.store.reader import RowReader

__all__ = ["MAX_PROBE_TOKENS", "compute_logits_by_blocks", "shorten_probe", "verify_by_blocks"]

MAX_PROBE_TOKENS = 128
"""Sequences of a language model's probe are used until they have this many tokens."""


def shorten_probe(base: BaseConfig, probe: Probe) -> Probe:
    """Return the sequences that are used: of a language model up to ``MAX_PROBE_TOKENS``."""
    if base.head != "lm":
        return probe
    rows = max(1, MAX_PROBE_TOKENS // probe.input_ids.shape[1])
    return Probe(probe.input_ids[:rows], probe.trained[:rows], probe.before[:rows])


def verify_by_blocks(
    base: BaseConfig, directory: Path, probe: Probe, labels: Sequence[str] = ()
) -> Comparison:
    """Run the model in ``directory`` on the probe, block by block, and compare.

    Args:
        base: its configuration: type to compute in, head, and whether its code may run; ``quant``
            is null, or that of a prequantized directory.
        directory: an exported directory, of plain or packed weights without a separate adapter.
        probe: the run's probe. Of a language model's, sequences beyond ``MAX_PROBE_TOKENS`` are
            left out; a classifier has one answer for each and keeps all.
        labels: classes of a classifier.

    Raises:
        VerificationError: the directory cannot be read as a model.
        VerificationSkipped: the model's own code does not run with weights that are read on use.
    """
    probe = shorten_probe(base, probe)
    logits = compute_logits_by_blocks(base, directory, probe.input_ids, labels)
    return compare_logits(logits, probe)


@torch.no_grad()
def compute_logits_by_blocks(
    base: BaseConfig, directory: Path, ids: Tensor, labels: Sequence[str] = ()
) -> Tensor:
    """Return the float32 logits of ``ids`` [B, S] by the model in ``directory``, block by block.

    Args:
        base, directory, labels: see ``verify_by_blocks``.

    Raises:
        VerificationError, VerificationSkipped: see ``verify_by_blocks``.
    """
    try:
        skeleton = build_skeleton(base, directory, labels)
        model = skeleton.model
        with (
            RowReader(skeleton.index) as reader,
            keep_freed_memory(),
            stream_weights(model, skeleton.blocks, reader),
        ):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        _refuse_meta(logits)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise VerificationSkipped(
            f"the code of {directory} reads a weight in a way that is not known here ({error}); "
            "pass --verify consumer"
        ) from None
    except UserError as error:
        raise VerificationError(f"{directory} cannot be read: {error}") from None
    return logits


def _refuse_meta(logits: Tensor) -> None:
    """Fail as products of a weight on meta with others do; those with none pass unnoticed."""
    if logits.is_meta:
        raise RuntimeError("logits on meta")
