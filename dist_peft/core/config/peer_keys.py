"""Keys of other trainers and the keys of this project that say the same.

``PEER_KEYS`` has keys of PEFT, TRL (and transformers' ``TrainingArguments``), axolotl,
LLaMA-Factory and torchtune. It is searched before spelling is compared: a key such as
``save_steps`` looks most like ``train.steps`` and means ``save.every``. ``peer_values`` has the
values.

A test looks up every key and value of the table in the configuration's own classes.
"""

from dataclasses import dataclass

__all__ = ["PEER_KEYS", "PEER_PATHS", "PeerKey", "find_peer_key"]


@dataclass(frozen=True)
class PeerKey:
    """Where a key of another trainer is here.

    Attributes:
        key: such as ``train.lr``; None if there is none.
        value: the value of ``key`` that says the same as the other key set to true.
        note: a difference of meaning, or the advice where there is no key.
        is_copied: whether a value of the other key is also right here.
        is_needless: the other key may be left out: what it asks for is always so here, or is
            without effect on what is trained.
    """

    key: str | None = None
    value: str | None = None
    note: str = ""
    is_copied: bool = False
    is_needless: bool = False

    def describe(self) -> str:
        """Return where it is in words that follow the name of the other key."""
        if self.key is None:
            return f"no key here: {self.note}"
        setting = self.key if self.value is None else f"{self.key}: {self.value}"
        return f"here it is {setting}" + (f" ({self.note})" if self.note else "")


def _same(key: str, note: str = "") -> PeerKey:
    return PeerKey(key, note=note, is_copied=True)


def _none(note: str) -> PeerKey:
    return PeerKey(note=note)


def _needless(note: str) -> PeerKey:
    return PeerKey(note=note, is_needless=True)


_BATCH = "sequences of a whole step, over all ranks and micro-batches"
_STEPS = "a number of steps"
_TRACKERS = "a list of wandb, mlflow and trackio; TensorBoard files are always written"
_WRITTEN = "metrics are always written to metrics.jsonl, TensorBoard files and report.html"
_ENVIRONMENT = "the tracker reads it from its environment (docs/tracking.md), with save.track"
_TEMPLATE = "Jinja text or a file of it; by default the template of the base's tokenizer"
_HELD_OUT = "a share of the records, or from 1 on their number"
_EPOCH_PARTS = "give a number of steps"
_PREFERENCES = "training is supervised; there is no preference or reinforcement learning"
_PIECES = "only new parameters are trained with LoRA; adapter.embeddings adapts the embedding"

PEER_KEYS: dict[str, PeerKey] = {
    # -- model
    "base_model": _same("base.path"),
    "model_name_or_path": _same("base.path"),
    "model_name": _same("base.path"),
    "model_id": _same("base.path"),
    "model": PeerKey("base.path"),
    "checkpoint_dir": PeerKey("base.path"),
    "base_model_config": _needless("the configuration is that of base.path"),
    "model_revision": _same("base.revision"),
    "revision_of_model": _same("base.revision"),
    "trust_remote_code": PeerKey(
        "base.trust_remote_code", note="on the command line only: base.trust_remote_code=true"
    ),
    "attn_implementation": _same("base.attention"),
    "flash_attention": PeerKey("base.attention", "flash_attention_2"),
    "flash_attn": PeerKey("base.attention", "flash_attention_2"),
    "sdp_attention": PeerKey("base.attention", "sdpa"),
    "eager_attention": PeerKey("base.attention", "eager"),
    "xformers_attention": PeerKey("base.attention", "sdpa"),
    "bf16": PeerKey("base.compute_dtype", "bfloat16"),
    "fp16": PeerKey("base.compute_dtype", "float16"),
    "bfloat16": PeerKey("base.compute_dtype", "bfloat16"),
    "float16": PeerKey("base.compute_dtype", "float16"),
    "pure_bf16": PeerKey("base.compute_dtype", "bfloat16"),
    "torch_dtype": PeerKey("base.compute_dtype"),
    "dtype": PeerKey("base.compute_dtype"),
    "bnb_4bit_compute_dtype": PeerKey("base.compute_dtype"),
    "load_in_4bit": PeerKey("base.quant", "{kind: nf4}", "false: base.quant: null"),
    "load_in_8bit": PeerKey("base.quant", "{kind: int, bits: 8}", "false: base.quant: null"),
    "quantization_bit": PeerKey("base.quant.bits", note="left out: base.quant: null"),
    "quantization_method": PeerKey("base.quant.kind", note="of hqq: base.quant.solver"),
    "quantization_type": PeerKey("base.quant.kind"),
    "bnb_4bit_quant_type": PeerKey("base.quant.kind"),
    "bnb_4bit_use_double_quant": _same("base.quant.double_quant"),
    "double_quantization": _same("base.quant.double_quant"),
    "quantization_config": PeerKey("base.quant"),
    "bnb_config_kwargs": PeerKey("base.quant"),
    "quantization": PeerKey("base.quant"),
    "gptq": _needless("base.path may be a GPTQ directory: leave base.quant out"),
    "num_labels": PeerKey("data.train[].labels", note="their names, with base.head: classifier"),
    # -- adapter
    "lora": PeerKey("adapter"),
    "lora_config": PeerKey("adapter"),
    "peft_config": PeerKey("adapter"),
    "peft": PeerKey("adapter"),
    "use_peft": PeerKey("adapter.kind"),
    "peft_type": PeerKey("adapter.kind", note="in lower case"),
    "finetuning_type": PeerKey("adapter.kind"),
    "lora_r": _same("adapter.r"),
    "lora_rank": _same("adapter.r"),
    "rank": _same("adapter.r"),
    "lora_alpha": _same("adapter.alpha"),
    "lora_dropout": _same("adapter.dropout"),
    "lora_target_modules": PeerKey("adapter.target_modules"),
    "lora_target": PeerKey("adapter.target_modules", note="all is all-linear; else a list"),
    "lora_target_linear": PeerKey("adapter.target_modules", "all-linear"),
    "lora_attn_modules": PeerKey("adapter.target_modules", note="a list of module names"),
    "apply_lora_to_mlp": PeerKey("adapter.target_modules", note="a list of module names"),
    "apply_lora_to_output": PeerKey("adapter.target_modules", note="add lm_head to the list"),
    "target_parameters": PeerKey("adapter.target_modules", note="all-linear has experts too"),
    "lora_target_parameters": PeerKey("adapter.target_modules", note="all-linear has experts too"),
    "exclude_modules": _none(
        "adapter.target_modules lists the linears that are adapted, by names or regular "
        "expressions: leave out the others"
    ),
    "layers_to_transform": _none(
        "adapter.target_modules takes regular expressions of whole names, such as "
        '[".*layers[.](0|1)[.].*"]'
    ),
    "modules_to_save": _none(_PIECES),
    "lora_modules_to_save": _none(_PIECES),
    "additional_target": _none(_PIECES),
    "init_lora_weights": PeerKey("adapter.init", note="true is default"),
    "peft_init_lora_weights": PeerKey("adapter.init", note="true is default"),
    "pissa_init": PeerKey("adapter.init", "pissa"),
    "pissa_iter": _same("adapter.init_iterations"),
    "loftq_config": PeerKey("adapter.init", "loftq"),
    "loftq_iter": _same("adapter.init_iterations"),
    "peft_use_dora": _same("adapter.use_dora"),
    "peft_use_rslora": _same("adapter.use_rslora"),
    "loraplus_lr_ratio": _same("adapter.lr_ratio"),
    "loraplus_lr_embedding": _none("embeddings have the rate of their factor, times lr_ratio"),
    "lora_model_dir": _none("a run starts from a new adapter; resume goes back to a checkpoint"),
    "adapter_name_or_path": _none("a run starts from a new adapter; resume is of a checkpoint"),
    "lora_bias": PeerKey("adapter.parts", "[biases]", "of kind: partial; LoRA trains no biases"),
    "bias": PeerKey("adapter.parts", "[biases]", "of kind: partial; LoRA trains no biases"),
    "task_type": PeerKey("base.head", note="lm or classifier"),
    "fan_in_fan_out": _needless("the layout of a weight is known from its module"),
    "lora_fan_in_fan_out": _needless("the layout of a weight is known from its module"),
    "inference_mode": _needless("train trains; merge, export and eval do not"),
    "freeze_trainable_layers": PeerKey("adapter.last_blocks", note="of kind: partial"),
    "unfrozen_parameters": PeerKey("adapter.parts", note="of kind: partial"),
    "lisa_n_layers": PeerKey("adapter.sample_blocks", note="its count, of kind: partial"),
    "lisa_step_interval": PeerKey("adapter.sample_blocks", note="its every, of kind: partial"),
    "prompt_tuning_init": PeerKey("adapter.init", note="in lower case, of kind: prompt"),
    "prompt_tuning_init_text": PeerKey("adapter.init_text", note="of kind: prompt"),
    "prefix_projection": PeerKey("adapter.projection", note="of kind: prefix"),
    # -- data
    "datasets": PeerKey("data.train", note="a list of {path, format, columns}"),
    "dataset": PeerKey("data.train", note="files or hub ids"),
    "dataset_name": PeerKey("data.train", note="files or hub ids"),
    "dataset_path": PeerKey("data.train"),
    "train_file": PeerKey("data.train"),
    "train_dataset": PeerKey("data.train"),
    "pretraining_dataset": PeerKey("data.train", note="with format: text"),
    "data_files": PeerKey("data.train[].path"),
    "dataset_dir": PeerKey("data.train", note="paths of files"),
    "test_datasets": PeerKey("data.eval"),
    "eval_dataset": PeerKey("data.eval"),
    "validation_file": PeerKey("data.eval"),
    "val_set_size": _same("data.val_split", _HELD_OUT),
    "val_size": _same("data.val_split", _HELD_OUT),
    "test_size": _same("data.val_split", _HELD_OUT),
    "sequence_len": _same("data.seq_len"),
    "max_seq_len": _same("data.seq_len"),
    "max_seq_length": _same("data.seq_len"),
    "max_length": _same("data.seq_len"),
    "cutoff_len": _same("data.seq_len"),
    "model_max_length": _same("data.seq_len"),
    "sample_packing": _same("data.packing"),
    "neat_packing": _same("data.packing"),
    "padding_free": PeerKey("data.packing", note="packed documents are isolated"),
    "excess_length_strategy": _same("data.too_long"),
    "truncation": PeerKey("data.too_long", "truncate"),
    "train_on_inputs": PeerKey("data.loss_on", "all", "false: completion, the default"),
    "train_on_prompt": PeerKey("data.loss_on", "all", "false: completion, the default"),
    "train_on_input": PeerKey("data.loss_on", "all", "false: completion, the default"),
    "completion_only_loss": PeerKey("data.loss_on", "completion"),
    "assistant_only_loss": PeerKey("data.loss_on", "completion"),
    "mask_history": _none("each assistant turn counts; train: false in a message leaves one out"),
    "dataset_text_field": PeerKey("data.train[].columns", note="{text: COLUMN}"),
    "field_messages": PeerKey("data.train[].columns", note="{messages: COLUMN}"),
    "column_map": PeerKey("data.train[].columns"),
    "max_samples": PeerKey("data.train[].limit"),
    "max_train_samples": PeerKey("data.train[].limit"),
    "mix_strategy": PeerKey("data.mixing"),
    "interleave_probs": PeerKey("data.train[].weight", note="with data.mixing: weights"),
    "chat_template": PeerKey("data.chat_template", note=_TEMPLATE),
    "chat_template_path": _same("data.chat_template"),
    "chat_template_jinja": _same("data.chat_template"),
    "template": PeerKey("data.chat_template", note=_TEMPLATE),
    "special_tokens": _none("special tokens are those of the base's tokenizer"),
    "tokens": _none("the vocabulary is that of the base's tokenizer"),
    "add_tokens": _none("the vocabulary is that of the base's tokenizer"),
    "streaming": _needless("files are read piece by piece and tokens are memory-mapped"),
    "dataset_num_proc": _same("data.workers"),
    "dataset_processes": _same("data.workers"),
    "preprocessing_num_workers": _same("data.workers"),
    "dataset_prepared_path": _same("data.cache_dir"),
    "disable_shuffling": PeerKey("train.shuffle", "false"),
    "group_by_length": _none("data.packing fills sequences"),
    # -- steps, batch and optimizer
    "learning_rate": _same("train.lr"),
    "max_steps": _same("train.steps"),
    "max_steps_per_epoch": PeerKey("train.steps"),
    "num_epochs": _same("train.epochs"),
    "num_train_epochs": _same("train.epochs"),
    "per_device_train_batch_size": _same("train.micro_batch"),
    "micro_batch_size": _same("train.micro_batch"),
    "batch_size": PeerKey("train.global_batch", note=f"{_BATCH}; a rank's are train.micro_batch"),
    "gradient_accumulation_steps": PeerKey("train.global_batch", note=_BATCH),
    "optim": PeerKey("train.optimizer"),
    "lr_scheduler": PeerKey("train.schedule"),
    "lr_scheduler_type": PeerKey("train.schedule"),
    "scheduler": PeerKey("train.schedule"),
    "warmup_steps": _same("train.warmup", "from 1 on a number of steps"),
    "num_warmup_steps": _same("train.warmup", "from 1 on a number of steps"),
    "warmup_ratio": _same("train.warmup", "below 1 a share of the steps"),
    "cosine_min_lr_ratio": _same("train.min_lr_ratio"),
    "adam_beta1": PeerKey("train.betas", note="[beta1, beta2]"),
    "adam_beta2": PeerKey("train.betas", note="[beta1, beta2]"),
    "adam_epsilon": _same("train.eps"),
    "gradient_clipping": _same("train.max_grad_norm"),
    "clip_grad_norm": _same("train.max_grad_norm"),
    "neftune_noise_alpha": _same("train.neftune_alpha"),
    "mixed_precision": PeerKey("train.precision"),
    "tf32": _needless("bfloat16 products do not use it"),
    "shuffle_merged_datasets": _same("train.shuffle"),
    "eval_steps": PeerKey("train.eval_every", note=_STEPS),
    "eval_strategy": PeerKey("train.eval_every", note=_STEPS),
    "evaluation_strategy": PeerKey("train.eval_every", note=_STEPS),
    "evals_per_epoch": PeerKey("train.eval_every", note=_EPOCH_PARTS),
    "logging_steps": _same("train.log_every"),
    "log_every_n_steps": _same("train.log_every"),
    "early_stopping_patience": _same("train.early_stop"),
    "early_stopping_steps": _same("train.early_stop"),
    "metric_for_best_model": PeerKey("train.metric_for_best", note="eval_loss is loss"),
    # -- engine
    "gradient_checkpointing": PeerKey("engine.activation_checkpointing"),
    "enable_activation_checkpointing": _same("engine.activation_checkpointing"),
    "disable_gradient_checkpointing": PeerKey("engine.activation_checkpointing", "false"),
    "deepspeed": PeerKey("engine.kind", "zero", "with engine.stage; a file: deepspeed_config"),
    "fsdp": PeerKey("engine.kind", "fsdp2"),
    "fsdp_config": PeerKey("engine.kind", "fsdp2"),
    "fsdp_version": PeerKey("engine.kind", "fsdp2"),
    "zero_stage": _same("engine.stage"),
    "fsdp_offload_params": PeerKey("engine.cpu_offload", "params"),
    "fsdp_cpu_offload": PeerKey("engine.cpu_offload", "params"),
    "ddp_timeout": PeerKey("engine.timeout_minutes", note="minutes, not seconds"),
    # -- run directory
    "output_dir": _same("save.dir"),
    "run_name": PeerKey("save.dir"),
    "save_steps": PeerKey("save.every", note=_STEPS),
    "save_strategy": PeerKey("save.every", note=_STEPS),
    "saves_per_epoch": PeerKey("save.every", note=_EPOCH_PARTS),
    "save_total_limit": _same("save.keep"),
    "load_best_model_at_end": _same("save.keep_best"),
    "save_adapter_weights_only": _needless("the base is never in a checkpoint"),
    "resume_from_checkpoint": PeerKey("resume"),
    "overwrite_output_dir": PeerKey("resume", "never", "by default a run is resumed"),
    "hub_model_id": _none("a run writes files only"),
    "push_to_hub": _none("a run writes files only"),
    "report_to": PeerKey("save.track", note=_TRACKERS),
    "metric_logger": PeerKey("save.track", note=_TRACKERS),
    "use_wandb": PeerKey("save.track", "[wandb]"),
    "use_mlflow": PeerKey("save.track", "[mlflow]"),
    "wandb_project": _none(_ENVIRONMENT),
    "wandb_entity": _none(_ENVIRONMENT),
    "mlflow_tracking_uri": _none(_ENVIRONMENT),
    "mlflow_experiment_name": _none(_ENVIRONMENT),
    "trackio_project": _none(_ENVIRONMENT),
    "use_tensorboard": _needless(_WRITTEN),
    "plot_loss": _needless(_WRITTEN),
    "logging_dir": _needless(_WRITTEN),
    # -- other kinds of training
    "rl": _none(_PREFERENCES),
    "pref_loss": _none(_PREFERENCES),
    "torch_compile": _none("modules are not compiled"),
    "compile": _none("modules are not compiled"),
}
"""By key, in lower case and with underscores."""

PEER_PATHS: dict[str, PeerKey] = {
    "stage": _needless("sft is the only stage (engine.stage is ZeRO's)"),
    "optimizer": PeerKey("train.optimizer"),
    "loss": _none("it is the mean cross-entropy of the target tokens"),
    "eval": PeerKey("data.eval"),
    "train.eval": PeerKey("data.eval"),
    "save.steps": PeerKey("save.every"),
    "save.limit": PeerKey("save.keep"),
}
"""By the whole path, where a key means that in this place only."""


def find_peer_key(path: str) -> PeerKey | None:
    """Return where a key of another trainer is here; None if no such trainer has it.

    Args:
        path: where the key was written, such as ``train.save_steps``: the last name counts at any
            nesting.
    """
    path = path.lower().replace("-", "_")
    return PEER_PATHS.get(path) or PEER_KEYS.get(path.rpartition(".")[2])
