"""Entry point of every command: notes signals before anything that takes long to import.

``launch/train.py``, ``python -m dist_peft`` and the console script import ``main`` from here.
Importing this module installs the handlers of ``core.stop_signals``; nothing else imports it.
"""

import os

from dist_peft.app.platform_check import refuse_unsupported_platform

refuse_unsupported_platform()

from dist_peft.core.stop_signals import note_stop_signals  # noqa: E402

note_stop_signals()

# read when torch is loaded: at "warning" a rank whose peer has left prints 20 lines of C++ frames,
# also after the last line of a run that was stopped
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# read when torch first allocates memory of a GPU: blocks that grow do not leave gaps of the sizes
# of gathered units, which differ
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from dist_peft.app.cli import main  # noqa: E402

__all__ = ["main"]
