"""Texts of ``--help`` besides the options: examples of each verb, and a configuration's sections.

A test parses every example, and checks its overrides against the configuration's classes.
"""

import textwrap

__all__ = ["EXAMPLES", "format_examples", "format_sections"]

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "dist-peft train --config run.yaml",
        "dist-peft train --config run.yaml train.steps=20 'adapter={kind: lora, r: 32}'",
        "torchrun --nproc-per-node 8 --no-python dist-peft train --config run.yaml",
    ),
    "init": (
        "dist-peft init --base models/llama-3-8b --data train.jsonl",
        "dist-peft init --base models/llama-3-8b --data train.jsonl --slurm --nodes 2 --gpus 8",
    ),
    "validate": (
        "dist-peft validate --config run.yaml --rows 3",
        "dist-peft validate --config run.yaml data.seq_len=512",
    ),
    "plan": (
        "dist-peft plan --config run.yaml --gpus-per-node 8 --gpu-memory 80GiB",
        "dist-peft plan --config run.yaml --gpu-memory 24GiB --search --out memory.svg",
    ),
    "eval": (
        "dist-peft eval --run runs/mine",
        "dist-peft eval --run runs/mine --checkpoint best --choices questions.jsonl",
        "dist-peft eval --config run.yaml adapter.kind=none",
    ),
    "quantize": ("dist-peft quantize --config run.yaml --out llama-int4 base.quant.kind=int",),
    "prune": (
        "dist-peft prune --config run.yaml --out pruned --method magnitude --sparsity 0.5",
        "dist-peft prune --config run.yaml --out pruned --method wanda --sparsity 2:4",
    ),
    "merge": (
        "dist-peft merge --run runs/mine --out merged",
        "dist-peft merge --run runs/mine --out merged --checkpoint best --base decoded",
    ),
    "export": (
        "dist-peft export --list",
        "dist-peft export --run runs/mine --out mine.gguf --format gguf --type q8_0",
        "dist-peft export --run runs/mine --out mine-mlx --format mlx",
        "dist-peft export --run runs/mine --out mine --format peft --push-to-hub me/mine --dry-run",
    ),
    "switch": ("dist-peft switch --merged merged --from runs/a --to runs/b --out merged-b",),
    "combine": (
        "dist-peft combine runs/a/adapter runs/b/adapter --out both --weights 0.5 0.5",
        "dist-peft combine runs/a/adapter runs/b/adapter --out both --method ties --density 0.3",
    ),
    "chat": (
        "dist-peft chat --run runs/mine --adapter both",
        "dist-peft chat --model merged --prompt 'Who are you?' --temperature 0.7",
    ),
    "compare": (
        "dist-peft compare runs/r8 runs/r32 --out compare.html",
        "dist-peft compare runs/* --json",
    ),
    "report": ("dist-peft report runs/mine",),
    "replay": (
        "dist-peft replay --run runs/mine --from 100 --to 110",
        "torchrun --nproc-per-node 2 --no-python dist-peft replay --run runs/mine --from 0 --to 9",
    ),
    "inspect": (
        "dist-peft inspect models/llama-3-8b",
        "dist-peft inspect runs/mine",
        "dist-peft inspect runs/mine/checkpoints/step-000100",
    ),
    "schema": ("dist-peft schema > dist_peft.schema.json",),
    "convert-config": (
        "dist-peft convert-config qlora.yml --out run.yaml",
        "dist-peft convert-config llama3_lora_sft.yaml --ranks 8 --out run.yaml",
    ),
    "completion": (
        "dist-peft completion bash > ~/.local/share/bash-completion/completions/dist-peft",
        "dist-peft completion zsh > ~/.zfunc/_dist-peft",
    ),
    "quickstart": (
        "dist-peft quickstart",
        "dist-peft quickstart --out runs/try --ranks 2",
    ),
}
"""By verb."""

_WIDTH = 80


def format_examples(verb: str) -> str:
    """Return the examples of ``verb`` as the end of its ``--help``."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES.get(verb, ()))])


def format_sections() -> str:
    """Return each section of a configuration with its meaning and its keys, for ``--help``."""
    # pydantic takes a part of a second to import, which --help of other verbs need not wait for
    from dist_peft.core.config.adapter import LoraConfig
    from dist_peft.core.config.data import DataSource
    from dist_peft.core.config.run import RunConfig
    from dist_peft.core.config.validation_messages import list_config_keys, list_section_classes

    lines = []
    for name, field in RunConfig.model_fields.items():
        classes = list_section_classes(field.annotation)
        if not classes:
            lines.append(f"{name}: {field.description}")
            continue
        own = LoraConfig if LoraConfig in classes else classes[0]
        about = " ".join((own.__doc__ or "").strip().split("\n\n")[0].split())
        lines += [f"{name}: {about}", *_wrap(", ".join(own.model_fields))]
        if len(classes) > 1:
            kinds = list_config_keys()["adapter.kind"]
            lines += _wrap(f"kinds, with keys of their own: {', '.join(kinds)}")
        if name == "data":
            lines += _wrap(f"train[], eval[]: {', '.join(DataSource.model_fields)}")
    return "\n".join([*lines, "docs/configuration.md describes every key."])


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - 4, initial_indent="  ", subsequent_indent="  ")
