"""Compute logits of an export with its target library, run by path in its environment's Python::

    python verify_consumer.py mlx|llama.cpp|gptq|adapters|bnb-nf4:DTYPE MODEL OUT.npy ID ID ...

It imports nothing from this package, since the libraries have conflicting requirements (another
torch for ``gptqmodel``, an older transformers for ``adapters``, a compiler for
``llama-cpp-python``) and may be installed in a separate environment. Prints the library's version;
writes float32 logits ``[1, n, vocabulary]``.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]


def main(argv: list[str]) -> None:
    consumer, model, out, *ids = argv
    kind, _, option = consumer.partition(":")
    options = [option] if option else []
    name, logits = _CONSUMERS[kind](Path(model), [int(i) for i in ids], *options)
    np.save(out, np.asarray(logits, dtype=np.float32)[None])
    print(name)


def _run_mlx(model: Path, ids: list[int]) -> tuple[str, Any]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    loaded = load_model(model)[0]
    logits = loaded(mx.array([ids])).astype(mx.float32)
    return f"mlx-lm {version('mlx-lm')}", np.array(logits)[0]


def _run_llama_cpp(model: Path, ids: list[int]) -> tuple[str, Any]:
    from llama_cpp import Llama

    context = max(len(ids), 32)
    loaded = Llama(str(model), n_ctx=context, n_batch=context, logits_all=True, verbose=False)
    loaded.eval(ids)
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})", loaded.scores[: len(ids)]


def _run_gptq(model: Path, ids: list[int]) -> tuple[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, device_map="cpu", dtype=torch.float32)
    if (model / "adapter").is_dir():
        loaded.load_adapter(str(model / "adapter"))
    with torch.no_grad():
        logits = loaded.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
    _check_generation(loaded, ids)
    return f"gptqmodel {version('gptqmodel')}", logits[0].float().numpy()


def _run_bitsandbytes(model: Path, ids: list[int], dtype: str) -> tuple[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(model, device_map="cpu", dtype=kind).eval()
    name = f"transformers {version('transformers')}, bitsandbytes {version('bitsandbytes')}"
    if (model / "adapter").is_dir():
        loaded.load_adapter(str(model / "adapter"))
        name += f", peft {version('peft')}"
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits
    _check_generation(loaded, ids)
    return name, logits[0].float().numpy()


def _check_generation(loaded: Any, ids: list[int]) -> None:
    """Generate two tokens, as users of the model will."""
    import torch

    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    loaded.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0
    )


def _run_adapters(model: Path, ids: list[int]) -> tuple[str, Any]:
    import adapters
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapters.init(loaded)
    loaded.load_adapter(str(model / "adapter"), use_safetensors=True, set_active=True)
    with torch.no_grad():
        logits = loaded.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
    return f"adapters {version('adapters')}", logits[0].float().numpy()


_CONSUMERS: dict[str, Any] = {
    "mlx": _run_mlx,
    "llama.cpp": _run_llama_cpp,
    "gptq": _run_gptq,
    "adapters": _run_adapters,
    "bnb-nf4": _run_bitsandbytes,
}

if __name__ == "__main__":
    main(sys.argv[1:])
