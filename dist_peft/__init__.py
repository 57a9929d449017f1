"""Fine-tune large language models with adapters on a frozen, quantized, sharded base.

Layers, each importing only those below it (checked by import-linter)::

    app                   verbs: compose the layers below
    train | export        independent siblings
    engine | adapters     independent siblings
    model                 plain nn.Modules, no process groups
    quant | store | data  independent siblings
    core
"""
