"""Entry point of every command: notes signals before anything that takes long to import.

``launch/train.py``, ``python -m dist_peft`` and the console script import ``main`` from here.
Importing this module installs the handlers of ``core.stop_signals``; nothing else imports it.
"""

from dist_peft.core.stop_signals import note_stop_signals

note_stop_signals()

from dist_peft.app.cli import main  # noqa: E402

__all__ = ["main"]
