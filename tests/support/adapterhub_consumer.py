"""Logits of a model with an adapter by AdapterHub's library, run by path in its environment::

    python adapterhub_consumer.py MODEL OUT.npy ID ID ...

``MODEL/adapter`` is the adapter. Prints the library's version and writes its logits, float32
``[1, n, vocabulary]``.
"""

import sys
from importlib.metadata import version
from pathlib import Path


def main(model: str, out: str, *ids: str) -> None:
    import adapters
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapters.init(loaded)
    loaded.load_adapter(str(Path(model) / "adapter"), use_safetensors=True, set_active=True)
    with torch.no_grad():
        tokens = torch.tensor([[int(i) for i in ids]])
        logits = loaded.eval()(input_ids=tokens, use_cache=False).logits
    np.save(out, logits.float().numpy())
    print(f"adapters {version('adapters')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
