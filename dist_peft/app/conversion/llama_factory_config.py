"""Conversion of a LLaMA-Factory configuration, one flat YAML file.

Data sets are named there, and described by ``dataset_info.json`` in ``dataset_dir``
(``llama_factory_sources``). What the file leaves out has the defaults of transformers' ``Trainer``.
"""

from typing import Any

from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile
from dist_peft.app.conversion.llama_factory_sources import DatasetTable
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

__all__ = ["convert_llama_factory_config"]

_DEFAULTS = TrainerDefaults(
    trainer="LLaMA-Factory",
    micro_batch=8,
    epochs=3,
    lr=5e-5,
    schedule="linear",
    warmup=0,
    seed=42,
    seq_len=2048,
)
_NEEDLESS = NEEDLESS_OPTIONS | {"eval_on_each_dataset", "buffer_size", "upcast_layernorm"}
_ATTENTION = {
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "sdpa": "sdpa",
    "disabled": "eager",
}


def convert_llama_factory_config(file: ForeignFile, draft: ConfigDraft, ranks: int) -> None:
    """Fill ``draft`` from the keys of ``file``.

    Args:
        ranks: devices that the file was for.

    Raises:
        UserError: the file asks for another kind of training, or a value cannot be read.
    """
    stage = file.take_value("stage", "sft")
    if stage not in ("sft", "pt"):
        raise UserError(
            f"{file.path}: stage: {stage} trains on preferences or rewards; dist-peft does the "
            "stages sft and pt only"
        )
    draft.put_setting("base.path", file.take_value("model_name_or_path"), "model_name_or_path")
    _convert_quantization(file, draft)
    convert_precision(file, draft)
    _convert_attention(file, draft)
    _convert_adapter(file, draft)
    _convert_data(file, draft, is_pretraining=stage == "pt")
    convert_engine(file, draft)
    convert_batch(file, draft, _DEFAULTS, "per_device_train_batch_size", ranks)
    convert_optimizer(file, draft, _DEFAULTS, "optim")
    convert_schedule(file, draft, _DEFAULTS, "lr_scheduler_type", "num_train_epochs")
    convert_evaluation(file, draft)
    convert_trackers(file, draft)
    if file.take_value("disable_shuffling"):
        draft.put_setting("train.shuffle", False, "disable_shuffling")
    draft.copy_remaining_keys(file, _NEEDLESS)


def _convert_quantization(file: ForeignFile, draft: ConfigDraft) -> None:
    bits = file.take_number("quantization_bit")
    method = str(file.take_value("quantization_method", "bnb")).lower()
    kind = file.take_value("quantization_type", "nf4")
    double = file.take_value("double_quantization")
    if not bits:
        draft.put_setting("base.quant", None, "no quantization_bit")
        return
    origin = f"quantization_bit: {bits}, quantization_method: {method}"
    quant: dict[str, Any] = {"kind": "int", "bits": bits}
    if method in ("bnb", "bitsandbytes") and bits == 4:
        quant = {"kind": "nf4"}
        if double is False:
            quant["double_quant"] = False
        if kind != "nf4":
            draft.list_unmatched("quantization_type", kind, "nearest: nf4")
    elif method == "hqq":
        quant["solver"] = "hqq"
    else:
        draft.list_unmatched(
            "quantization_method", f"{method}, {bits} bits", "nearest: integers in groups of 64"
        )
    draft.put_setting("base.quant", quant, origin)


def _convert_attention(file: ForeignFile, draft: ConfigDraft) -> None:
    given = file.take_value("flash_attn", "auto")
    if str(given) in _ATTENTION:
        draft.put_setting("base.attention", _ATTENTION[str(given)], f"flash_attn: {given}")
    elif given != "auto":
        draft.list_unmatched("flash_attn", given, "base.attention: auto")


def _convert_adapter(file: ForeignFile, draft: ConfigDraft) -> None:
    kind = file.take_value("finetuning_type", "lora")
    if kind == "full":
        draft.put_setting("adapter.kind", "full", "finetuning_type")
    elif kind == "freeze":
        _convert_freezing(file, draft)
    elif kind == "lora":
        draft.put_setting("adapter.kind", "lora", "finetuning_type")
        _convert_lora(file, draft)
    else:
        raise UserError(
            f"{file.path}: finetuning_type: {kind} has no counterpart; lora, freeze and full are "
            "converted"
        )


def _convert_freezing(file: ForeignFile, draft: ConfigDraft) -> None:
    count = file.take_number("freeze_trainable_layers", 2) or 2
    modules = file.take_value("freeze_trainable_modules", "all")
    if count < 0:
        raise UserError(
            f"{file.path}: freeze_trainable_layers: {count} trains the first blocks; write "
            "adapter: {kind: partial, blocks: [0, 1]} by hand"
        )
    draft.put_setting("adapter.kind", "partial", "finetuning_type: freeze")
    draft.put_setting("adapter.last_blocks", count, "freeze_trainable_layers")
    if modules != "all":
        draft.list_unmatched("freeze_trainable_modules", modules, "whole blocks are trained")


def _convert_lora(file: ForeignFile, draft: ConfigDraft) -> None:
    rank = file.take_number("lora_rank")
    draft.put_setting("adapter.r", rank or 8, "lora_rank" if rank else _DEFAULTS.origin)
    alpha = file.take_number("lora_alpha")
    origin = "lora_alpha" if alpha else f"{_DEFAULTS.origin}: 2 x lora_rank"
    draft.put_setting("adapter.alpha", alpha or 2 * (rank or 8), origin)
    draft.put_setting("adapter.dropout", file.take_number("lora_dropout", 0), "lora_dropout")
    targets = file.take_value("lora_target", "all")
    names = targets if isinstance(targets, list) else str(targets).split(",")
    names = [str(name).strip() for name in names]
    whole = names == ["all"]
    draft.put_setting("adapter.target_modules", "all-linear" if whole else names, "lora_target")
    for name in ("use_dora", "use_rslora"):
        if file.take_value(name):
            draft.put_setting(f"adapter.{name}", True, name)
    if (ratio := file.take_number("loraplus_lr_ratio")) is not None:
        draft.put_setting("adapter.lr_ratio", ratio, "loraplus_lr_ratio")
    pissa, iterations = file.take_value("pissa_init"), file.take_number("pissa_iter", 16)
    if pissa:
        draft.put_setting("adapter.init", "pissa", "pissa_init")
        if iterations and iterations > 0:
            draft.put_setting("adapter.init_iterations", iterations, "pissa_iter")


def _convert_data(file: ForeignFile, draft: ConfigDraft, *, is_pretraining: bool) -> None:
    names = _split_names(file.take_value("dataset"))
    if not names:
        raise UserError(f"{file.path} has no dataset; add the names of the training data")
    table = DatasetTable.find(file.take_value("dataset_dir", "data"), file.path.parent)
    limit = file.take_number("max_samples")
    train = [table.convert_source(n, draft, is_text=is_pretraining, limit=limit) for n in names]
    weights = _split_names(file.take_value("interleave_probs"))
    strategy = file.take_value("mix_strategy", "concat")
    if strategy != "concat":
        draft.put_setting("data.mixing", "weights", f"mix_strategy: {strategy}")
        for source, weight in zip(train, weights, strict=False):
            source["weight"] = float(weight)
    draft.put_setting("data.train", train, "dataset")
    held_out = _split_names(file.take_value("eval_dataset"))
    share = file.take_number("val_size")
    if held_out:
        sources = [
            table.convert_source(n, draft, is_text=is_pretraining, limit=limit) for n in held_out
        ]
        draft.put_setting("data.eval", sources, "eval_dataset")
    elif share:
        draft.put_setting("data.val_split", share, "val_size")
    length = file.take_number("cutoff_len")
    origin = _DEFAULTS.origin if length is None else "cutoff_len"
    draft.put_setting("data.seq_len", length or _DEFAULTS.seq_len, origin)
    packing, neat = file.take_value("packing"), file.take_value("neat_packing")
    packs = bool(is_pretraining if packing is None and not neat else packing or neat)
    draft.put_setting("data.packing", packs, "neat_packing" if neat else "packing")
    cut = "split" if is_pretraining else "truncate"
    draft.put_setting("data.too_long", cut, "longer records are cut at cutoff_len")
    if file.take_value("train_on_prompt"):
        draft.put_setting("data.loss_on", "all", "train_on_prompt")
    template = file.take_value("template")
    if not is_pretraining:
        reason = "the base's tokenizer decides; data.chat_template takes Jinja text or a file"
        draft.list_unmatched("template", template, reason)


def _split_names(value: Any) -> list[str]:
    if value is None:
        return []
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]
