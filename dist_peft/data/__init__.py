"""From files to batches: records, chat templates and loss masks, token cache, packing, loader."""

from dist_peft.data.chat import make_default_chat_template
from dist_peft.data.documents import SequenceSet, load_sequence_set
from dist_peft.data.loader import Batch, Loader
from dist_peft.data.sequence_text import format_sequence

__all__ = [
    "Batch",
    "Loader",
    "SequenceSet",
    "format_sequence",
    "load_sequence_set",
    "make_default_chat_template",
]
