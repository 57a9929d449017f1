"""Merge an adapter into its base by streaming and write a plain Hugging Face directory.

Every tensor of the base is processed in row chunks. A chunk of an adapted weight is read, merged in
float32, cast to the output type and written at its offset; nothing else is in memory. Threads share
the tensors out. Two bases can be merged into:

* ``original``: the rows as stored in the base's files. The usual choice for serving; differs from
  the trained function by the quantization error of the base.
* ``decoded``: the rows as training saw them, ``decode(encode(rows))``. Reproduces the trained
  function up to the rounding of the output type.

Peak memory is four times ``chunk_bytes`` for each thread, independent of the size of the model
(``weight_threads``).
"""

from pathlib import Path
from typing import Literal

import torch

from dist_peft.adapters.directory import keeps_zeros_of_base
from dist_peft.core.config.run import BaseConfig
from dist_peft.export.merge_record import MergeRecord
from dist_peft.export.merged_weights import CHUNK_BYTES, open_merged_weights
from dist_peft.export.model_directory import (
    WriteResult,
    copy_tokenizer_files,
    describe_written_model,
    write_model_directory,
)
from dist_peft.export.stopping import add_stop_tokens
from dist_peft.model.model_files import copy_model_files, list_model_files
from dist_peft.store.publish import check_output_free, publish_directory
from dist_peft.store.writer import MAX_FILE_BYTES

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
    overwrite: bool = False,
    keep_zeros: bool = False,
) -> WriteResult:
    """Merge the adapter into the base and write the Hugging Face directory ``out`` in ``dtype``.

    Args:
        base: the run's base configuration.
        directory: directory of the base's files.
        adapter_dir: directory of the trained adapter.
        out: output directory; created if missing, must be empty.
        into: rows to merge into, as stored (``original``) or dequantized (``decoded``).
        dtype: type of the written floating-point tensors.
        chunk_bytes: size of a chunk of rows in float32.
        max_file_bytes: maximum size of an output file.
        overwrite: replace an export that is in ``out``.
        keep_zeros: block weights that are exactly 0 in the base stay 0, also where the adapter
            was not trained so.

    Raises:
        UserError: the adapter does not fit the base, ``out`` is not empty, the disk is full.
    """
    check_output_free(out, overwrite=overwrite, inputs=(directory, adapter_dir))
    # fail before the merge if a file cannot be copied
    list_model_files(directory, code=base.trust_remote_code)
    with publish_directory(out) as partial:
        with open_merged_weights(
            base, directory, adapter_dir, into, chunk_bytes, keep_zeros=keep_zeros
        ) as walk:
            written = write_model_directory(walk, None, partial, dtype, max_file_bytes)
            changes = describe_written_model(walk, directory, code=base.trust_remote_code)
        copy_model_files(directory, partial, dtype, changes, code=base.trust_remote_code)
        copy_tokenizer_files(adapter_dir, partial)
        record = MergeRecord.of_adapter(
            adapter_dir,
            format="hf-bf16",
            state=into,
            dtype=str(dtype).removeprefix("torch."),
            keeps_zeros=keep_zeros or keeps_zeros_of_base(adapter_dir),
            stop_tokens=add_stop_tokens(adapter_dir, partial),
        )
        record.write_to_directory(partial)
    return written
