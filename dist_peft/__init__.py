"""Fine-tune large language models with adapters on a frozen, quantized, sharded base.

The Python API (docs/python.md) is imported when a name of it is used, so that ``import dist_peft``
takes no time::

    from dist_peft import attach, export_run, load, load_config, merge_run

Layers, each importing only those below it (checked by import-linter)::

    app                   verbs: compose the layers below
    quickstart            text, task and small model of ``dist-peft quickstart``
    train | export | compress   independent siblings
    engine | adapters     independent siblings
    model                 plain nn.Modules, no process groups
    quant | store | data  independent siblings
    core
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_peft.app.adapter_training import AdapterTraining
    from dist_peft.app.python_api import LoadedBase, attach, export_run, load, merge_run
    from dist_peft.core.config.io import load_config
    from dist_peft.core.errors import UserError

__all__ = [
    "AdapterTraining",
    "LoadedBase",
    "UserError",
    "attach",
    "export_run",
    "load",
    "load_config",
    "merge_run",
]

_MODULES = {
    "AdapterTraining": "dist_peft.app.adapter_training",
    "load_config": "dist_peft.core.config.io",
    "UserError": "dist_peft.core.errors",
}
_API = "dist_peft.app.python_api"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_peft.app.platform_check import find_platform_obstacle

    if (reason := find_platform_obstacle(sys.platform)) is not None:
        raise ImportError(reason)
    return getattr(import_module(_MODULES.get(name, _API)), name)
