"""Quantize a model with gptqmodel. Run by path, by a Python that has gptqmodel::

    GPTQMODEL_CPU_WORKERS=2 python gptqmodel_base.py MODEL OUT SETTINGS.json ID ID ...

Writes the directory ``OUT``, and ``OUT.safetensors`` with what gptqmodel itself then makes of it:
``logits`` of the ids, and the decoded weights ``PATH`` where its linears can tell them.
"""

import json
import sys

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

_, model, out, settings, *words = sys.argv
ids = torch.tensor([[int(word) for word in words]])
text = [" ".join(f"w{(7 * i + j) % 97}" for j in range(50)) for i in range(16)]
loaded = GPTQModel.load(model, QuantizeConfig(**json.loads(settings)), device="cpu")
loaded.quantize(text, batch_size=1)
loaded.save(out)

reloaded = AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype=torch.float32).eval()
with torch.no_grad():
    found = {"logits": reloaded(input_ids=ids, use_cache=False).logits.float()}
for name, module in reloaded.named_modules():
    if hasattr(module, "dequantize_weight"):
        found[name] = module.dequantize_weight().T.contiguous()
save_file(found, f"{out}.safetensors")
