"""Merging by streaming: base rows + adapter rows -> a plain Hugging Face directory.

Every tensor of the base is walked in row chunks. A chunk of an adapted weight is read, turned to
float32, merged, cast and written at its place in the output; nothing else is in memory. Two bases
can be merged into:

* ``original``: the rows as the base's files have them. What people serve; differs from the trained
  function by the quantization error of the base.
* ``decoded``: the rows as training saw them, ``decode(encode(rows))``. Reproduces the trained
  function up to the rounding of the output type.

Peak memory is one chunk in float32 with its codes and product (about three times ``chunk_bytes``)
whatever the size of the model.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from dist_peft.core.config.run import BaseConfig
from dist_peft.export.merged_weights import CHUNK_BYTES, open_walk
from dist_peft.export.model_directory import (
    MAX_FILE_BYTES,
    Written,
    check_new,
    copy_configuration,
    copy_tokenizer,
    write_directory,
)
from dist_peft.export.model_files import model_files
from dist_peft.export.stopping import add_stop_tokens
from dist_peft.model.classifier import settings_of
from dist_peft.model.hub import load_tokenizer

__all__ = ["merge_model"]


def merge_model(
    base: BaseConfig,
    directory: Path,
    adapter_dir: Path,
    out: Path,
    *,
    into: Literal["original", "decoded"] = "original",
    dtype: torch.dtype = torch.bfloat16,
    chunk_bytes: int = CHUNK_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Written:
    """Write ``directory`` + adapter as a Hugging Face directory ``out`` in ``dtype``.

    Raises:
        UserError: the adapter does not fit the base, ``out`` is not empty, the disk is full.
    """
    check_new(out)
    model_files(directory, code=base.trust_remote_code)  # what cannot be copied is said first
    with open_walk(base, directory, adapter_dir, into, chunk_bytes) as walk:
        written = write_directory(walk, None, out, dtype, max_file_bytes)
        changes: dict[str, Any] = dict(walk.skeleton.settings)
        if walk.skeleton.head is not None:
            tokenizer = load_tokenizer(directory, base.trust_remote_code)
            changes |= settings_of(walk.skeleton.model, tokenizer)
    copy_configuration(directory, out, dtype, changes, code=base.trust_remote_code)
    copy_tokenizer(adapter_dir, out)
    add_stop_tokens(adapter_dir, out)
    return written
