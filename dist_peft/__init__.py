"""Fine-tune large language models with adapters on a frozen, quantized, sharded base.

Layers, each importing only those below it (checked by import-linter)::

    app                   verbs: compose the layers below
    quickstart            text, task and small model of ``dist-peft quickstart``
    train | export | compress   independent siblings
    engine | adapters     independent siblings
    model                 plain nn.Modules, no process groups
    quant | store | data  independent siblings
    core
"""
