"""From files to batches: records, chat templates and loss masks, token cache, packing, loader."""

from dist_peft.data.chat import make_default_chat_template
from dist_peft.data.documents import SequenceSet, format_sequence, load_sequence_set
from dist_peft.data.loader import Batch, Loader

__all__ = [
    "Batch",
    "Loader",
    "SequenceSet",
    "format_sequence",
    "load_sequence_set",
    "make_default_chat_template",
]
