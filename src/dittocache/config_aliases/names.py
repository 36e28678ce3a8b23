"""Settings of the specifications' configs that have another name here, and values that have another name too.

Those with a section are of the embedding cache's specification, those without of the job files of the automatic
pre-caching workflow, which are TOML.

This table is the documentation: what is not in it, and not in `rules.py`, is no setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES: Mapping[str, str] = {
    "data.init_args.cache_dir": "cache.cache_dir",
    "data.init_args.use_cache": "cache.use_cache",
    "data.init_args.caption_dropout_rate": "data.caption_dropout",
    "data.batch_size": "train.batch_size",
    "data.num_workers": "cache.num_workers",
    "cache.vae_encoder_device": "cache.devices.vae",
    "cache.text_encoder_device": "cache.devices.text_encoder",
    "cache.text_encoder_2_device": "cache.devices.text_encoder_2",
    "cache.devices.vae_encoder": "cache.devices.vae",
    "model.pretrained_model_name_or_path": "model.path",
    "model.rank": "train.rank",
    "model.lora.r": "train.rank",
    "model.lora.lora_alpha": "train.alpha",
    "model.lora.target_modules": "train.lora_targets",
    "model.lora.init_lora_weights": "train.lora_init",
    "optimizer.class_path": "train.optimizer",
    "optimizer.init_args.lr": "train.learning_rate",
    "optimizer.init_args.betas": "train.betas",
    "optimizer.init_args.weight_decay": "train.weight_decay",
    "optimizer.init_args": "train.optimizer_args",
    "lr_scheduler.scheduler_type": "train.lr_schedule",
    "lr_scheduler.warmup_steps": "train.warmup_steps",
    "lr_scheduler.num_cycles": "train.lr_cycles",
    "lr_scheduler.power": "train.lr_power",
    "train.train_batch_size": "train.batch_size",
    "train.max_train_steps": "train.steps",
    "train.num_epochs": "train.epochs",
    "train.checkpointing_steps": "train.checkpoint_every",
    "train.checkpoints_total_limit": "train.keep_checkpoints",
    "logging.output_dir": "output_dir",
    "logging.report_to": "train.log_with",
    "logging.tracker_project_name": "name",
    "validation.steps": "train.validate_every",
    "validation.validation_steps": "train.validate_every",
    "validation.max_samples": "train.validation_pictures",
    "validation.num_validation_samples": "train.validation_pictures",
    "dataset_config": "data.path",
    "output_name": "name",
    "caching_latent_device": "cache.devices.vae",
    "caching_latent_batch_size": "cache.latent_batch_size",
    "caching_latent_num_workers": "cache.latent_num_workers",
    "caching_latent_skip_existing": "cache.latent_skip_existing",
    "caching_latent_keep_cache": "cache.latent_keep_cache",
    "caching_teo_device": "cache.devices.text_encoder",
    "caching_teo_fp8_vl": "cache.text_encoder_fp8",
    "caching_teo_batch_size": "cache.text_batch_size",
    "caching_teo_num_workers": "cache.text_num_workers",
    "caching_teo_skip_existing": "cache.text_skip_existing",
    "caching_teo_keep_cache": "cache.text_keep_cache",
    "network_dim": "train.rank",
    "network_alpha": "train.alpha",
    "learning_rate": "train.learning_rate",
    "max_train_steps": "train.steps",
    "max_train_epochs": "train.epochs",
    "lr_warmup_steps": "train.warmup_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "save_every_n_steps": "train.checkpoint_every",
    "seed": "train.seed",
    "optimizer_type": "train.optimizer",
    "log_with": "train.log_with",
}

VALUES: Mapping[str, Mapping[Any, Any]] = {
    "lr_scheduler.scheduler_type": {"constant_with_warmup": "constant", "cosine_with_warmup": "cosine"},
    "lr_scheduler.num_cycles": {0.5: 1},  # half a wave: what a cosine without restarts has in any case
    "optimizer_type": {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "Prodigy": "prodigy"},
    "log_with": {"all": ["tensorboard", "wandb"]},
    "logging.report_to": {"all": ["tensorboard", "wandb"], "none": [], None: []},
}
"""Values that have other names too."""

NULL_SAYS_NOTHING = ("logging.tracker_project_name", "train.num_epochs", "train.checkpoints_total_limit")
"""Settings whose `null` is the same as leaving them out."""

FAMILIES: Mapping[str, str] = {
    "QwenImageEdit": "qwen-image-edit",
    "QwenImageEditPlus": "qwen-image-edit-plus",
    "QwenImageT2I": "qwen-image",
    "FluxKontext": "flux-kontext",
}
"""`trainer` of the specification's configs, and the family that it is here."""

SECTIONS = (
    "data.init_args.processor.init_args",
    "data.init_args.processor",
    "data.init_args",
    "model.lora",
    "optimizer.init_args",
    "optimizer",
    "lr_scheduler",
    "logging",
    "loss.init_args",
    "loss",
    "train.fit_device",
    "predict.devices",
    "predict",
    "validation",
)
"""Sections that exist in the specification's configs only: gone once all that they held is understood."""
