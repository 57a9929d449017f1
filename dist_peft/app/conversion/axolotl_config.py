"""Conversion of an axolotl configuration, one flat YAML file."""

from typing import Any

from dist_peft.app.conversion.axolotl_sources import convert_source_list
from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile
from dist_peft.app.conversion.trainer_options import (
    NEEDLESS_OPTIONS,
    TrainerDefaults,
    convert_batch,
    convert_engine,
    convert_evaluation,
    convert_optimizer,
    convert_precision,
    convert_schedule,
    convert_trackers,
)
from dist_peft.core.errors import UserError

__all__ = ["convert_axolotl_config"]

_DEFAULTS = TrainerDefaults(
    trainer="axolotl",
    micro_batch=1,
    epochs=1,
    lr=None,  # required there
    schedule="cosine",
    warmup=0.03,
    seed=42,
    seq_len=512,
)
_NEEDLESS = NEEDLESS_OPTIONS | {
    "is_llama_derived_model",
    "is_mistral_derived_model",
    "is_qwen_derived_model",
    "is_falcon_derived_model",
    "lora_on_cpu",
    "qlora_sharded_model_loading",
    "xformers_attention",
    "s2_attention",
    "sample_packing_group_size",
    "sample_packing_bin_size",
    "eval_table_size",
    "eval_max_new_tokens",
    "multipack_real_batches",
    "val_set_seed",
    "shuffle_before_merging_datasets",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "saves_total_limit",
}


def convert_axolotl_config(file: ForeignFile, draft: ConfigDraft, ranks: int) -> None:
    """Fill ``draft`` from the keys of ``file``.

    Args:
        ranks: devices that the file was for.

    Raises:
        UserError: the file asks for another kind of training, or a value cannot be read.
    """
    for name in ("rl", "reward_model", "process_reward_model"):
        if file.has_value(name):
            raise UserError(
                f"{file.path}: {name}: {file.take_value(name)} trains on preferences or rewards; "
                "dist-peft trains on texts and conversations only"
            )
        file.take_value(name)
    draft.put_setting("base.path", file.take_value("base_model"), "base_model")
    _convert_adapter(file, draft)
    _convert_attention(file, draft)
    convert_precision(file, draft)
    _convert_data(file, draft)
    convert_engine(file, draft)
    convert_batch(file, draft, _DEFAULTS, "micro_batch_size", ranks)
    convert_optimizer(file, draft, _DEFAULTS, "optimizer")
    convert_schedule(file, draft, _DEFAULTS, "lr_scheduler", "num_epochs")
    convert_evaluation(file, draft)
    convert_trackers(file, draft)
    if file.take_value("shuffle_merged_datasets") is False:
        draft.put_setting("train.shuffle", False, "shuffle_merged_datasets")
    draft.copy_remaining_keys(file, _NEEDLESS)


def _convert_adapter(file: ForeignFile, draft: ConfigDraft) -> None:
    kind = file.take_value("adapter")
    _convert_quantization(file, draft, kind)
    if not kind:
        draft.put_setting("adapter.kind", "full", "no adapter")
        return
    if kind not in ("lora", "qlora"):
        raise UserError(
            f"{file.path}: adapter: {kind} has no counterpart; lora and qlora are converted"
        )
    draft.put_setting("adapter.kind", "lora", f"adapter: {kind}")
    for name, ours in (("lora_r", "r"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        default = 0 if ours == "dropout" else None
        if (value := file.take_number(name, default)) is not None:
            draft.put_setting(f"adapter.{ours}", value, name)
    modules, linear = file.take_value("lora_target_modules"), file.take_value("lora_target_linear")
    if linear or modules in ("all-linear", None, []):
        draft.put_setting("adapter.target_modules", "all-linear", "lora_target_linear")
    else:
        names = [modules] if isinstance(modules, str) else modules
        draft.put_setting("adapter.target_modules", names, "lora_target_modules")
    for name in ("use_dora", "use_rslora"):
        if file.take_value(f"peft_{name}"):
            draft.put_setting(f"adapter.{name}", True, f"peft_{name}")
    if (init := file.take_value("peft_init_lora_weights")) is not None:
        draft.put_known_value("adapter.init", "peft_init_lora_weights", init, ("pissa", "eva"))
    if (options := file.take_value("loftq_config")) is not None:
        draft.put_setting("adapter.init", "loftq", "loftq_config")
        draft.list_unmatched("loftq_config", options, "the bits are those of base.quant")


def _convert_quantization(file: ForeignFile, draft: ConfigDraft, kind: object) -> None:
    in_4bit, in_8bit = file.take_value("load_in_4bit"), file.take_value("load_in_8bit")
    options = file.take_value("bnb_config_kwargs", {})
    options = dict(options) if isinstance(options, dict) else {"bnb_config_kwargs": options}
    if file.has_value("gptq"):
        draft.list_needless("gptq", file.take_value("gptq"))  # base.path says so itself
    elif in_4bit or kind == "qlora":
        quant: dict[str, Any] = {"kind": "nf4"}
        if "bnb_4bit_use_double_quant" in options:
            quant["double_quant"] = bool(options.pop("bnb_4bit_use_double_quant"))
        if options.get("bnb_4bit_quant_type") == "nf4":
            options.pop("bnb_4bit_quant_type")
        draft.put_setting("base.quant", quant, "load_in_4bit")
    elif in_8bit:
        draft.put_setting("base.quant", {"kind": "int", "bits": 8}, "load_in_8bit")
        reason = "integers in groups of 64 inputs, without LLM.int8's outliers"
        draft.list_unmatched("load_in_8bit", True, f"nearest: base.quant {{kind: int}}, {reason}")
    else:
        draft.put_setting("base.quant", None, "neither load_in_4bit nor load_in_8bit")
    for name, value in options.items():
        draft.list_unmatched(f"bnb_config_kwargs.{name}", value, "no counterpart in base.quant")


def _convert_attention(file: ForeignFile, draft: ConfigDraft) -> None:
    for name, implementation in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
        ("flex_attention", "flex_attention"),
    ):
        if file.take_value(name):
            draft.put_setting("base.attention", implementation, name)
    if (given := file.take_value("attn_implementation")) is not None:
        draft.put_setting("base.attention", given, "attn_implementation")


def _convert_data(file: ForeignFile, draft: ConfigDraft) -> None:
    datasets = file.take_value("datasets", [])
    pretraining = file.take_value("pretraining_dataset", [])
    train = convert_source_list(datasets, "datasets", draft)
    train += convert_source_list(pretraining, "pretraining_dataset", draft)
    if not train:
        raise UserError(f"{file.path} has no datasets; add the list of training files")
    draft.put_setting("data.train", train, "datasets" if datasets else "pretraining_dataset")
    held_out = convert_source_list(file.take_value("test_datasets", []), "test_datasets", draft)
    share = file.take_number("val_set_size")
    if held_out:
        draft.put_setting("data.eval", held_out, "test_datasets")
    elif share:
        draft.put_setting("data.val_split", share, "val_set_size")
    length = file.take_number("sequence_len")
    origin = _DEFAULTS.origin if length is None else "sequence_len"
    draft.put_setting("data.seq_len", length or _DEFAULTS.seq_len, origin)
    draft.put_setting("data.packing", bool(file.take_value("sample_packing")), "sample_packing")
    if file.take_value("train_on_inputs"):
        draft.put_setting("data.loss_on", "all", "train_on_inputs")
    if (strategy := file.take_value("excess_length_strategy")) is None:
        draft.put_setting("data.too_long", "drop", _DEFAULTS.origin)
    else:
        known = ("drop", "truncate", "error")
        draft.put_known_value("data.too_long", "excess_length_strategy", strategy, known)
    name, text = file.take_value("chat_template"), file.take_value("chat_template_jinja")
    if text is not None:
        draft.put_setting("data.chat_template", text, "chat_template_jinja")
    elif name not in (None, "tokenizer_default"):
        reason = "the base's tokenizer decides; data.chat_template takes Jinja text or a file"
        draft.list_unmatched("chat_template", name, reason)
