"""Finished runs without training: a small Llama, a random adapter, and the trained model."""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from dist_peft.adapters.directory import write_adapter_directory
from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.app.commands.train import train_from_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import BaseConfig, QuantConfig
from dist_peft.core.log import close_log
from dist_peft.core.span import Span
from dist_peft.core.world import World
from dist_peft.export import verify_consumer, verify_formats
from dist_peft.export.formats.export_spec import ExportResult, ExportSpec
from dist_peft.export.formats.registry import FORMATS
from dist_peft.export.merged_weights import open_merged_weights
from dist_peft.export.verify import Comparison, Probe
from dist_peft.export.verify_formats import ConsumerRequest
from dist_peft.model.skeleton import parse_torch_dtype
from dist_peft.quant.codec import make_codec
from tests.support.dist import call_in_process
from tests.support.tiny_models import save_model
from tests.support.tiny_runs import save_records, tiny_tree

VOCABULARY = 320
TEXT = "the quick brown fox jumps over the lazy dog; it's 12345 times that we've seen it. "
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def llama(**changes: Any) -> tf.LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return tf.LlamaConfig(**{**settings, **changes})


def save_tokenizer(directory: Path) -> None:
    """Byte-level BPE as GPT-2 has it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


@dataclass
class FakeRun:
    """``trained`` are the float32 weights of the trained model by name in the files."""

    base: BaseConfig
    directory: Path
    adapter_dir: Path
    probe: Probe
    trained: dict[str, Tensor]

    def job(self, out: Path, **settings: Any) -> ExportSpec:
        """Fields of ``ExportSpec``, and options of the format by key."""
        known = {field.name for field in fields(ExportSpec)}
        options = {key: settings.pop(key) for key in settings.keys() - known}
        return ExportSpec(
            self.base, self.directory, self.adapter_dir, out, **settings, options=options
        )

    def verify(self, name: str, exported: ExportResult, **settings: Any) -> tuple[str, Comparison]:
        """Load an export with its library and compare it with the trained model."""
        job = self.job(exported.path, **settings)
        request = ConsumerRequest(exported.path, self.probe, job.compute_dtype)
        return FORMATS[name].verify_export(job, request)


def make_run(
    root: Path,
    quant: QuantConfig | None,
    *,
    group: int = 1,
    dtype: str = "float32",
    config: tf.PretrainedConfig | None = None,
    **changes: Any,
) -> FakeRun:
    """Args: ``group`` columns of the adapter's A are equal (QA-LoRA); ``changes`` of the model;
    ``config`` of another model, whose experts have no adapter and are not quantized."""
    model = save_model(config or llama(**changes), root / "base", seed=3).float()
    save_tokenizer(root / "base")
    base = BaseConfig(path=str(root / "base"), quant=quant, compute_dtype=dtype)
    codec = make_codec(quant, parse_torch_dtype(dtype))
    generator = torch.Generator().manual_seed(5)
    tensors, deltas = {}, {}
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if (
            not stem.endswith(PROJECTIONS)
            or weight.dim() != 2
            or "vision" in stem
            or name.endswith("bias")
        ):
            weight.data = weight.data.to(parse_torch_dtype(dtype)).float()
            continue
        out, columns = weight.shape
        weight.data = codec.dequantize_rows(
            codec.quantize_to_packed(weight.data), columns, torch.float32
        )
        pooled = torch.randn(4, -(-columns // group), generator=generator) * 0.03
        A = pooled.repeat_interleave(group, 1)[:, :columns].contiguous()
        B = torch.randn(out, 4, generator=generator) * 0.03
        tensors |= {
            f"base_model.model.{stem}.lora_A.weight": A,
            f"base_model.model.{stem}.lora_B.weight": B,
        }
        deltas[name] = 2.0 * B @ A
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(root / "base"),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [p.rpartition(".")[2] for p in PROJECTIONS],
        "inference_mode": True,
    }
    write_adapter_directory(root / "adapter", PublicAdapter(config, tensors), {})
    ids = torch.arange(3, 27).unsqueeze(0) * 11 % VOCABULARY
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for name, delta in deltas.items():
            weights[name].data += delta
        trained = model(input_ids=ids, use_cache=False).logits
    state = {name: weight.data.clone() for name, weight in weights.items()}
    return FakeRun(base, root / "base", root / "adapter", Probe(ids, trained, before), state)


def decode_base(run: FakeRun) -> dict[str, Tensor]:
    """Linears of the base as training saw them, by name: decode(encode(rows))."""
    codec = make_codec(run.base.quant, parse_torch_dtype(run.base.compute_dtype))
    tensors = load_file(run.directory / "model.safetensors")
    return {
        name: codec.dequantize_rows(
            codec.quantize_to_packed(weight), weight.shape[1], torch.float32
        )
        for name, weight in tensors.items()
        if "proj" in name
    }


def mark_as_trained_through(run: FakeRun) -> None:
    """The adapter as one that was trained through the quantizer: the base's rows are encoded with
    it."""
    file = run.adapter_dir / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "through_quantizer": True}))


def mixture(family: str) -> tf.PretrainedConfig:
    """A mixture of four experts that all formats pack; ``mixtral`` or ``qwen3_moe``."""
    sizes = {**llama(intermediate_size=96).to_dict(), "num_experts_per_tok": 2}
    for key in ("model_type", "architectures", "dtype", "mlp_bias", "attention_bias"):
        sizes.pop(key, None)
    if family == "mixtral":
        return tf.MixtralConfig(**sizes, num_local_experts=4)
    return tf.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=96, norm_topk_prob=True)


def stacked_mixture(family: str) -> tf.PretrainedConfig:
    """A mixture whose files have the experts stacked, without names of single ones: ``granitemoe``,
    ``llama4_text`` or ``gpt_oss``, the latter two transposed."""
    settings = {**llama(intermediate_size=128).to_dict(), "num_local_experts": 4}
    settings["initializer_range"] = 0.1  # experts matter for the logits
    for key in ("model_type", "architectures", "dtype", "mlp_bias", "attention_bias"):
        settings.pop(key, None)
    if family == "granitemoe":
        return tf.GraniteMoeConfig(**settings, num_experts_per_tok=2)
    if family == "gpt_oss":
        return tf.GptOssConfig(**settings, num_experts_per_tok=2)
    return tf.Llama4TextConfig(**settings, intermediate_size_mlp=128, interleave_moe_layer_step=1)


CONFIG = tf.LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
"""in_features are multiples of 64 (o_proj: 64, down_proj: 192)."""


def finished_run(
    directory: Path, quant: dict[str, Any], adapter: dict[str, Any], *, tied: bool = False
) -> Path:
    """A run of three steps on a random Llama."""
    config = tf.LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    tree = tiny_tree(directory, adapter={"r": 5, "alpha": 10, **adapter})
    save_model(config, directory / "base")  # tiny_tree writes a base of its own
    tree["base"] |= {"path": str(directory / "base"), "quant": quant}
    tree["data"]["train"] = [str(save_records(directory / "train.jsonl"))]
    assert train_from_config(parse_config(tree), World()) == 0
    close_log()
    return directory / "run"


def fork_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run consumers of this Python in forked processes, which have the libraries loaded.

    Importing them takes longer than the rest; ``test_verified_export`` and a case of
    ``test_kept_nf4`` start the process as users do.
    """

    def run_forked(
        command: list[str], scratch: str, environment: dict[str, str], name: str, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        python, script, *argv = command
        if python != sys.executable:  # has a library that is not here
            return start(command, scratch, environment, name, seconds)
        assert script == verify_consumer.__file__
        code, out, err = call_in_process(_consume, argv, timeout=seconds)
        return subprocess.CompletedProcess(command, code, out, err)

    start = verify_formats._run_with_timeout
    monkeypatch.setattr(verify_formats, "_run_with_timeout", run_forked)


def _consume(argv: list[str]) -> tuple[int, str, str]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            verify_consumer.main(argv)
    except Exception:
        return 1, out.getvalue(), traceback.format_exc()
    return 0, out.getvalue(), ""


def read_trained_rows(run: FakeRun) -> dict[str, Tensor]:
    """Weights of the blocks as they were trained through the quantizer, float32, by name."""
    with open_merged_weights(run.base, run.directory, run.adapter_dir, "trained") as walk:
        return {
            weight.name: walk.read_merged_rows(weight, Span(0, weight.num_rows))
            for weight in walk.weights
            if walk.is_packable(weight)
        }
