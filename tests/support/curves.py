"""Reports without curves: drawing them takes longer than most runs of these tests."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock


def skip_curves() -> AbstractContextManager[Any]:
    """Draw empty images in reports, if anything here makes reports."""
    if "dist_peft.train.report" not in sys.modules:  # it takes matplotlib to import
        return nullcontext()
    return mock.patch("dist_peft.train.report.draw_plot", return_value="")
