"""Other spellings of settings that configs of the embedding cache's specification use.

data.init_args.cache_dir, data.init_args.use_cache             cache.cache_dir, cache.use_cache
data.init_args.dataset_path, data.init_args.caption_dropout_rate   data.path, data.caption_dropout
cache.vae_encoder_device, cache.text_encoder_device            cache.devices.vae, cache.devices.text_encoder
cache.prompt_empty_drop_keys                                   checked: prompt dropout always replaces both
model.pretrained_model_name_or_path, model.lora.{r, lora_alpha}   model.path, train.rank, train.alpha
optimizer.class_path, optimizer.init_args                      train.optimizer, and lr, betas, weight_decay; the others
                                                               become train.optimizer_args
lr_scheduler.{scheduler_type, warmup_steps, num_cycles, power} train.lr_schedule, warmup_steps, lr_cycles, lr_power
train.max_train_steps, checkpointing_steps, checkpoints_total_limit   train.steps, checkpoint_every, keep_checkpoints
data.batch_size, logging.output_dir, logging.report_to         train.batch_size, output_dir, train.log_with
validation.{enabled, steps, max_samples}                       train.validate_every, train.validation_pictures
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES: Mapping[str, str] = {
    "data.init_args.cache_dir": "cache.cache_dir",
    "data.init_args.use_cache": "cache.use_cache",
    "data.init_args.dataset_path": "data.path",
    "data.init_args.caption_dropout_rate": "data.caption_dropout",
    "data.batch_size": "train.batch_size",
    "cache.vae_encoder_device": "cache.devices.vae",
    "cache.text_encoder_device": "cache.devices.text_encoder",
    "model.pretrained_model_name_or_path": "model.path",
    "model.lora.r": "train.rank",
    "model.lora.lora_alpha": "train.alpha",
    "optimizer.class_path": "train.optimizer",
    "optimizer.init_args.lr": "train.learning_rate",
    "optimizer.init_args.betas": "train.betas",
    "optimizer.init_args.weight_decay": "train.weight_decay",
    "optimizer.init_args": "train.optimizer_args",
    "lr_scheduler.scheduler_type": "train.lr_schedule",
    "lr_scheduler.warmup_steps": "train.warmup_steps",
    "lr_scheduler.num_cycles": "train.lr_cycles",
    "lr_scheduler.power": "train.lr_power",
    "train.max_train_steps": "train.steps",
    "train.checkpointing_steps": "train.checkpoint_every",
    "train.checkpoints_total_limit": "train.keep_checkpoints",
    "logging.output_dir": "output_dir",
    "logging.report_to": "train.log_with",
    "validation.steps": "train.validate_every",
    "validation.validation_steps": "train.validate_every",
    "validation.max_samples": "train.validation_pictures",
    "validation.num_validation_samples": "train.validation_pictures",
}

VALUES: Mapping[str, Mapping[Any, Any]] = {
    "lr_scheduler.scheduler_type": {"constant_with_warmup": "constant", "cosine_with_warmup": "cosine"},
    "lr_scheduler.num_cycles": {0.5: 1},  # half a wave: what a cosine without restarts has in any case
    "logging.report_to": {"all": ["tensorboard", "wandb"], "none": [], None: []},
}
"""Values that have other names too."""

SECTIONS = ("data.init_args", "model.lora", "optimizer.init_args", "optimizer", "lr_scheduler", "logging", "validation")
"""Sections that exist in the specification's configs only: gone once all that they held is understood."""

EMPTY_PROMPT_ARTIFACTS = frozenset({"empty_prompt_embeds", "empty_prompt_embeds_mask"})


def resolve_aliases(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A copy of `settings` (nested) with every alias under its own name.

    A setting given under both names with different values is added to `problems`.
    """
    resolved = _copied(settings)
    if _taken(resolved, "validation.enabled", True) is False:
        del resolved["validation"]
    for alias, name in ALIASES.items():
        missing = object()
        value = _taken(resolved, alias, missing)
        if value is missing or (alias == "optimizer.init_args" and value == {}):
            continue
        value = _renamed(alias, value)
        section, last = _section_of(resolved, name)
        if section is None:
            problems.append(f"{alias}: {name} cannot be set, because {name.rpartition('.')[0]} holds no settings")
        elif last in section and section[last] != value:
            problems.append(f"{alias} is {value!r} but {name} is {section[last]!r}; they mean the same: keep one")
        else:
            section[last] = value
    for name in SECTIONS:
        section = _taken(resolved, name, {})
        if section != {}:  # put back what was not understood, to be named as unknown
            holder, last = _section_of(resolved, name)
            if holder is not None:
                holder[last] = section
    _check_drop_keys(resolved, problems)
    return resolved


def _renamed(alias: str, value: Any) -> Any:
    for other, ours in VALUES.get(alias, {}).items():
        if value == other:
            return ours
    return value


def _check_drop_keys(settings: dict[str, Any], problems: list[str]) -> None:
    keys = _taken(settings, "cache.prompt_empty_drop_keys", None)
    if keys is None:
        return
    expected = ", ".join(sorted(EMPTY_PROMPT_ARTIFACTS))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        problems.append(f"cache.prompt_empty_drop_keys: found {keys!r}; expected a list of {expected}")
    elif set(keys) != EMPTY_PROMPT_ARTIFACTS:
        problems.append(
            f"cache.prompt_empty_drop_keys: found {', '.join(keys)}; expected {expected}: they are replaced together"
        )


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _taken(settings: dict[str, Any], name: str, default: Any) -> Any:
    """The value of a dotted name, removed from `settings`; `default` where it is not there."""
    *sections, last = name.split(".")
    level: Any = settings
    for section in sections:
        level = level.get(section) if isinstance(level, dict) else None
    return level.pop(last, default) if isinstance(level, dict) else default


def _section_of(settings: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a dotted name, made where it is missing, and the name's last part."""
    *sections, last = name.split(".")
    level = settings
    for section in sections:
        inner = level.get(section)
        if inner is None:
            inner = level[section] = {}
        if not isinstance(inner, dict):
            return None, last
        level = inner
    return level, last
