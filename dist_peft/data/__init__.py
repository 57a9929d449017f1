"""From files to batches: records, chat templates and loss masks, token cache, packing, loader."""

from dist_peft.data.chat import default_chat_template
from dist_peft.data.documents import RowSet, load_rows, show_row
from dist_peft.data.loader import Batch, Loader

__all__ = ["Batch", "Loader", "RowSet", "default_chat_template", "load_rows", "show_row"]
