"""Other trainers' option names, and what they are called here: hints for errors.

The names are those of transformers' TrainingArguments, TRL's DPOConfig and DPOTrainer,
and EasyDeL. None of them is accepted: sizes and units differ, as the notes say.
"""

from typing import NamedTuple


class Alias(NamedTuple):
    """Our dotted key (None: there is no such option), and what differs, or why."""

    key: str | None
    note: str = ""


_BATCH = "pairs of one optimizer step over all devices and accumulation steps, not per "
_DTYPE = "bfloat16 or float32"
_NO_CODE = "no code is run on rows; write the file as it is to be read"
_NOT_QUANTISED = "parameters are bfloat16 or float32, see model.param_dtype"

ALIASES = {
    # Lengths of a run
    "max_steps": Alias("trainer.max_training_steps"),
    "epochs": Alias("trainer.num_train_epochs"),
    "num_epochs": Alias("trainer.num_train_epochs"),
    "per_device_train_batch_size": Alias("trainer.total_batch_size", _BATCH + "device"),
    "per_gpu_train_batch_size": Alias("trainer.total_batch_size", _BATCH + "GPU"),
    "train_batch_size": Alias("trainer.total_batch_size", _BATCH + "device"),
    "batch_size": Alias("trainer.total_batch_size", _BATCH + "device"),
    "auto_find_batch_size": Alias("trainer.total_batch_size", "it is never changed"),
    "dataloader_drop_last": Alias("trainer.drop_last"),
    "data_seed": Alias("trainer.seed"),
    "per_device_batch_size": Alias("trainer.total_batch_size", _BATCH + "device"),
    "global_batch_size": Alias("trainer.total_batch_size"),
    "micro_batch_size": Alias(
        "trainer.gradient_accumulation_steps", "a count of microbatches, not their size"
    ),
    "gradient_accumulation": Alias("trainer.gradient_accumulation_steps"),
    "group_by_length": Alias(None, "batches are padded to a few lengths"),
    "do_train": Alias("actions", "a list of train and validate"),
    "do_eval": Alias("eval_mixture", "what it names is evaluated"),
    "full_determinism": Alias(None, "every run is deterministic"),
    # Optimizer
    "lr": Alias("trainer.learning_rate"),
    "scheduler": Alias("trainer.lr_scheduler_type", "constant, linear, cosine, ..."),
    "lr_scheduler": Alias("trainer.lr_scheduler_type"),
    "lr_scheduler_args": Alias("trainer.lr_scheduler_kwargs"),
    "learning_rate_end": Alias(
        "trainer.lr_scheduler_kwargs",
        "min_lr of cosine_with_min_lr, lr_end of polynomial",
    ),
    "optim_args": Alias(None, "each optimizer's options are trainer's own"),
    "extra_optimizer_kwargs": Alias(None, "each optimizer's options are trainer's own"),
    "tx_mu_dtype": Alias("trainer.mu_dtype", "float32, bfloat16 or 8bit"),
    "momentum": Alias("trainer.sgd_momentum"),
    "nesterov": Alias("trainer.sgd_nesterov"),
    "optim": Alias(
        "trainer.optimizer",
        "adamw, lion, adafactor, sgd or muon; adamw_8bit is adamw with mu_dtype and "
        "nu_dtype 8bit",
    ),
    "adam_eps": Alias("trainer.adam_epsilon"),
    "label_smoothing_factor": Alias("trainer.label_smoothing"),
    "clip_grad": Alias("trainer.max_grad_norm"),
    "gradient_clipping": Alias("trainer.max_grad_norm"),
    # Model
    "model_name_or_path": Alias("model.name_or_path"),
    "pretrained_model_name_or_path": Alias("model.name_or_path"),
    "ref_model": Alias("reference_model", "a section with name_or_path"),
    "ref_model_name_or_path": Alias("reference_model.name_or_path"),
    "processing_class": Alias("model.tokenizer"),
    "tokenizer_name_or_path": Alias("model.tokenizer"),
    "bf16": Alias("model.dtype", _DTYPE),
    "fp16": Alias("model.dtype", _DTYPE),
    "grad_reduce_dtype": Alias("model.reduce_dtype"),
    "communication_data_type": Alias("model.reduce_dtype"),
    "tf32": Alias("model.dtype", _DTYPE),
    "torch_dtype": Alias("model.dtype", _DTYPE),
    "model_init_kwargs": Alias("model", "its keys are the options of loading"),
    "gradient_checkpointing": Alias("model.remat", "auto, none, dots, full or offload"),
    "attn_implementation": Alias(
        "trainer.attention", "auto, tiles, cudnn, splash or tokamax"
    ),
    "peft_config": Alias("lora", "a section of PEFT's names"),
    "use_peft": Alias("lora", "a section; without it all parameters are trained"),
    "use_lora": Alias("lora", "a section; without it all parameters are trained"),
    "lora_r": Alias("lora.r"),
    "lora_rank": Alias("lora.r"),
    "lora_target_modules": Alias("lora.target_modules"),
    "adapter_name_or_path": Alias("lora.adapter"),
    "lora_model_path": Alias("lora.adapter"),
    "ref_adapter_name": Alias("reference_model.adapter", "a directory"),
    "load_in_4bit": Alias(None, _NOT_QUANTISED),
    "load_in_8bit": Alias(None, _NOT_QUANTISED),
    "quantization_config": Alias(None, _NOT_QUANTISED),
    "trust_remote_code": Alias(None, "code of a checkpoint or data set is never run"),
    "sharding_array": Alias("sharding", "its keys are data, fsdp and tensor"),
    # Data
    "train_dataset": Alias("mixture", "a section with informs"),
    "dataset": Alias("mixture", "a section with informs"),
    "eval_dataset": Alias("eval_mixture", "a section with informs"),
    "dataset_name": Alias("mixture.informs.0.data_files"),
    "dataset_config": Alias("mixture.informs.0.dataset_split_name"),
    "dataset_train_split": Alias("mixture.informs.0.split"),
    "dataset_test_split": Alias("eval_mixture.informs.0.split"),
    "max_train_samples": Alias("mixture.informs.0.num_rows"),
    "dataset_num_proc": Alias(None, "the tokenizer's own threads are used"),
    "dataloader_num_workers": Alias(None, "batches are made in a thread of their own"),
    "remove_unused_columns": Alias(None, "columns that are not needed are never read"),
    "max_eval_samples": Alias("eval_mixture.informs.0.num_rows"),
    "max_seq_length": Alias("trainer.max_length"),
    "max_sequence_length": Alias("trainer.max_length"),
    "cutoff_len": Alias("trainer.max_length"),
    "max_target_length": Alias("trainer.max_completion_length"),
    "max_response_length": Alias("trainer.max_completion_length"),
    "format_fields": Alias(
        "mixture.informs.0.columns", "the other way round: our name, then the file's"
    ),
    "column_mapping": Alias(
        "mixture.informs.0.columns", "by our name, what the file calls it"
    ),
    "content_field": Alias(
        "mixture.informs.0.columns", "a pair has several: prompt, chosen, rejected"
    ),
    "additional_fields": Alias(None, "columns that are not needed are never read"),
    "format_callback": Alias(None, _NO_CODE),
    "preprocessing_fn": Alias(None, _NO_CODE),
    "buffer_size": Alias("mixture.shuffle_buffer_size", "with streaming"),
    "assistant_only_loss": Alias("trainer.score", "completion, assistant or last_turn"),
    "padding_free": Alias("trainer.packing"),
    "padding_value": Alias(None, "padding is never seen by the model"),
    "label_pad_token_id": Alias(None, "padding is never scored"),
    # Loss
    "loss": Alias("trainer.loss_type"),
    "dpo_beta": Alias("trainer.beta"),
    "dpo_loss_type": Alias("trainer.loss_type"),
    "pref_loss": Alias("trainer.loss_type"),
    "pref_ftx": Alias("trainer.rpo_alpha"),
    "dpo_alpha": Alias("trainer.rpo_alpha"),
    "sft_weight": Alias("trainer.rpo_alpha"),
    "ld_dpo_alpha": Alias("trainer.ld_alpha"),
    "dpop_alpha": Alias("trainer.dpop_lambda"),
    "gamma_beta_ratio": Alias("trainer.simpo_gamma", "beta times that ratio"),
    "precompute_ref_batch_size": Alias(
        None, "pairs are scored in the batches of training, so that they round alike"
    ),
    "use_liger_kernel": Alias("trainer.implementation", "of the log-probabilities"),
    "use_liger_loss": Alias("trainer.implementation", "of the log-probabilities"),
    # Reports
    "output_dir": Alias("trainer.save_directory"),
    "logging_dir": Alias(
        "trainer.save_directory", "metrics.jsonl and tensorboard are written there"
    ),
    "overwrite_output_dir": Alias("trainer.save_directory"),
    "run_name": Alias("trainer.model_name"),
    "logging_steps": Alias("trainer.log_steps", "a whole number of optimizer steps"),
    "report_steps": Alias("trainer.log_steps"),
    "report_to": Alias(
        "trainer.use_wandb", "true or false; so is trainer.use_tensorboard"
    ),
    "disable_tqdm": Alias("trainer.progress_bar", "the opposite"),
    "generate_during_eval": Alias(
        "trainer.generation_num_prompts", "how many held-out prompts are answered"
    ),
    "generation_prompts": Alias(
        "trainer.generation_num_prompts", "the first held-out ones are taken"
    ),
    "generation_interval": Alias("trainer.eval_steps", "at each evaluation"),
    "generation_seed": Alias("trainer.seed"),
    "generation_do_sample": Alias("trainer.generation_temperature", "0: greedy"),
    "max_new_tokens": Alias("trainer.generation_max_new_tokens"),
    "eval_strategy": Alias("trainer.eval_steps", "without it: once, at the end"),
    "evaluation_strategy": Alias("trainer.eval_steps", "without it: once, at the end"),
    "evaluation_steps": Alias("trainer.eval_steps"),
    "per_device_eval_batch_size": Alias(
        "trainer.eval_batch_size", "pairs over all devices, not per device"
    ),
    "save_strategy": Alias("trainer.save_steps", "or save_interval_minutes"),
    "early_stopping": Alias(
        "trainer.early_stopping_patience", "evaluations without a better one"
    ),
    "patience": Alias("trainer.early_stopping_patience"),
    "best_metric": Alias("trainer.metric_for_best_model"),
    "monitor": Alias("trainer.metric_for_best_model"),
    "save_best_only": Alias("trainer.load_best_model_at_end"),
    "resume_from_checkpoint": Alias("trainer.resume", "true or false"),
    "push_to_hub": Alias(None, "nothing is uploaded; the model is in save_directory"),
    "hub_model_id": Alias(None, "nothing is uploaded; the model is in save_directory"),
    "deepspeed": Alias("sharding", "its keys are data, fsdp and tensor"),
    "fsdp_config": Alias("sharding", "its keys are data, fsdp and tensor"),
}


def other_name(name: str) -> str:
    """`; here it is 'ours' (what differs)` for another trainer's option, or nothing."""
    alias = ALIASES.get(name.replace("-", "_").lower())
    if alias is None:
        return ""
    if alias.key is None:
        return f"; nothing here is like it: {alias.note}; remove it"
    note = f" ({alias.note})" if alias.note else ""
    return f"; here it is {alias.key!r}{note}"
