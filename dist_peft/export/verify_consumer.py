"""Compute logits of an export with its target library, run by path in its environment's Python::

    python verify_consumer.py FILE FUNCTION MODEL OUT.npy "[ID, ID, ...]" [OPTION ...]

``FILE`` defines ``FUNCTION(model, ids, *options)``, which returns the library's version and its
logits ``[n, vocabulary]``. The version is printed; logits are written as float32
``[1, n, vocabulary]``.

Neither imports anything from this package, since the libraries have conflicting requirements
(another torch for ``gptqmodel``, a compiler for ``llama-cpp-python``) and may be installed in a
separate environment.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main", "run_plain_transformers"]


def main(argv: list[str]) -> None:
    """Run a function of the file ``argv[0]`` on a model and save its logits."""
    file, function, model, out, ids, *options = argv
    namespace: dict[str, Any] = {"Path": Path, "Any": Any}
    exec(compile(Path(file).read_text(), file, "exec"), namespace)
    name, logits = namespace[function](Path(model), json.loads(ids), *options)
    np.save(out, np.asarray(logits, dtype=np.float32)[None])
    print(name)


def run_plain_transformers(
    model: Path, ids: list[Any], dtype: str, *packages: str
) -> tuple[str, Any]:
    """Load as users do, with the adapter in ``adapter/`` if there is one, and generate.

    Args:
        model: the exported directory.
        ids: tokens of one sequence, or of a classifier's texts.
        dtype: type that the model computes in.
        packages: distributions whose versions are reported.
    """
    import json
    from importlib.metadata import version

    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    described = json.loads((model / "config.json").read_text())
    named = described.get("architectures") or [""]
    classifies = named[0].endswith("ForSequenceClassification")
    wraps = described.get("model_type") not in CAUSAL and not described.get("auto_map")
    name = "AutoModelForImageTextToText" if wraps else "AutoModelForCausalLM"
    auto: Any = getattr(transformers, "AutoModelForSequenceClassification" if classifies else name)
    loaded = auto.from_pretrained(model, device_map="cpu", dtype=getattr(torch, dtype)).eval()
    name = ", ".join(f"{package} {version(package)}" for package in packages)
    if (model / "adapter").is_dir():
        loaded.load_adapter(str(model / "adapter"))
        name += f", peft {version('peft')}"
    prompt = torch.tensor(ids if classifies and isinstance(ids[0], list) else [ids])
    with torch.no_grad():
        if classifies:
            return name, loaded(input_ids=prompt).logits.float().numpy()
        logits = loaded(input_ids=prompt, use_cache=False).logits[0].float().numpy()
    loaded.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
    )
    return name, logits


if __name__ == "__main__":
    main(sys.argv[1:])
