"""Add a LoRA to a transformer, save it as diffusers does, and load it back to go on training."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dittocache.errors import ModelError
from dittocache.families.base import Family
from dittocache.families.denoiser import is_isolated
from dittocache.families.loading import diffusers_class
from dittocache.referencekv.isolation import isolate_references
from dittocache.referencekv.rules import VISIBILITY_KEY
from dittocache.training.config import TrainConfig

ADAPTER_NAME = "default"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
SETTINGS_KEY = "dittocache"  # metadata entry beside PEFT's own

Visibility = Literal["full", "isolated"]


def add_lora(transformer: Any, family: Family, config: TrainConfig) -> list[torch.nn.Parameter]:
    """Freeze `transformer`, add a LoRA on its target layers, and return its parameters (float32, trainable).

    The targets are `config.lora_targets`, else the family's. The first factor is drawn from `config.seed`, whatever
    was drawn before; the second is zero, so that the output does not change. With `config.reference_visibility`
    isolated the transformer's references are isolated from here on, in training and in pictures made with it.

    Raises ModelError where the transformer has an adapter already, or one of the targets is not there, and
    ReferenceCacheError where references cannot be isolated.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if ADAPTER_NAME in getattr(transformer, "peft_config", {}):
        raise ModelError(f"the transformer already has an adapter named {ADAPTER_NAME!r}; load the model anew")
    transformer.requires_grad_(False)
    targets = config.lora_targets or family.lora_targets
    if config.lora_targets is not None:
        _require_targets(transformer, config.lora_targets)
    lora_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,
        lora_dropout=config.lora_dropout,
        init_lora_weights=True if config.lora_init == "uniform" else config.lora_init,
        target_modules=target_pattern(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            transformer.add_adapter(lora_config, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ModelError(
                f"cannot add a LoRA of family {family.name!r} to a {type(transformer).__name__}: {error}"
            ) from error
    if config.reference_visibility == "isolated" and not is_isolated(transformer):
        isolate_references(transformer)
    cast_training_params(transformer, dtype=torch.float32)  # 16-bit AdamW loses small updates
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def target_pattern(targets: str | Sequence[str]) -> str:
    """The regular expression of whole module names for `peft.LoraConfig(target_modules=...)`.

    `targets` is that expression, or a list of expressions for how a name ends, from a dot on. PEFT's own lists cannot
    tell FLUX's `single_transformer_blocks.0.proj_out` from the model's last layer, `proj_out`.
    """
    return targets if isinstance(targets, str) else rf"(?:.*\.)?(?:{'|'.join(targets)})"


def _require_targets(transformer: Any, targets: str | Sequence[str]) -> None:
    """Raise ModelError where a target is no layer's: PEFT is content when any of them is."""
    names = [name for name, _ in transformer.named_modules()]
    absent = []
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target_pattern(targets if isinstance(targets, str) else [target])
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ModelError(
                f"train.lora_targets: {target!r} is no regular expression ({error}); a dot, a star and brackets have "
                "meanings there"
            ) from error
        absent += [] if found else [target]
    if absent:
        raise ModelError(
            f"a {type(transformer).__name__} has no layer {', '.join(map(repr, absent))} for the LoRA; "
            "mend train.lora_targets, or leave it out"
        )


def save_lora(transformer: Any, family: Family, folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write the LoRA to `folder`, where `pipe.load_lora_weights(folder)` finds it; return the file.

    `metadata` (JSON values: the settings of the run) stands in the file's header under `dittocache`, beside PEFT's
    configuration, and under `reference_visibility` whether references were isolated (`full` or `isolated`). If they
    were, PEFT's configuration says it too: it goes with the LoRA into the model. The file appears whole or not at all.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft_config = _json_values(transformer.peft_config[ADAPTER_NAME].to_dict())
    visibility = _visibility(transformer)
    if visibility == "isolated":
        peft_config["auto_mapping"] = {VISIBILITY_KEY: visibility}
    adapter = {f"{_transformer_name(family)}.{key}": value for key, value in peft_config.items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, sort_keys=True),
        SETTINGS_KEY: json.dumps(metadata, sort_keys=True),
        VISIBILITY_KEY: visibility,
    }

    def write(weights: dict[str, torch.Tensor], path: str) -> None:
        # Contiguous copies in host memory: safetensors refuses views.
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, metadata=header)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHT_NAME}.{os.getpid()}"
    diffusers_class(family.pipeline_class_name).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER_NAME),
        weight_name=temporary.name,
        save_function=write,
    )
    os.replace(temporary, folder / WEIGHT_NAME)
    return folder / WEIGHT_NAME


def restore_lora(transformer: Any, family: Family, folder: Path) -> None:
    """Put saved weights into the LoRA that `add_lora` made.

    Raises ModelError where they do not fit it, or were trained with another visibility of references.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    trained_with = read_reference_visibility(folder)
    if trained_with != _visibility(transformer):
        raise ModelError(
            f"the LoRA in {folder} was trained with train.reference_visibility {trained_with}, this transformer's "
            f"references are {_visibility(transformer)}; set train.reference_visibility to {trained_with}"
        )
    prefix = f"{_transformer_name(family)}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / WEIGHT_NAME).items()}
    try:
        outcome = set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER_NAME)
    except RuntimeError as error:
        raise ModelError(f"the LoRA in {folder} does not fit this transformer and rank: {error}") from error
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if missing or outcome.unexpected_keys:
        raise ModelError(
            f"the LoRA in {folder} does not fit this transformer: "
            f"missing {missing[:3]}, not expected {list(outcome.unexpected_keys)[:3]}"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The `metadata` that a LoRA was saved with; empty for one that dittocache did not write."""
    settings: dict[str, Any] = json.loads(_header(folder).get(SETTINGS_KEY, "{}"))
    return settings


def read_reference_visibility(folder: Path) -> Visibility:
    """Whether a LoRA was trained with isolated references, and so must be used with them; else `full`.

    Raises ModelError for a word that this version does not know.
    """
    found = _header(folder).get(VISIBILITY_KEY, "full")
    if found not in ("full", "isolated"):
        raise ModelError(
            f"{folder / WEIGHT_NAME} names the {VISIBILITY_KEY} {found!r}, expected 'full' or 'isolated'; "
            "it may have been written by a newer version"
        )
    return "isolated" if found == "isolated" else "full"


def _header(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHT_NAME, framework="pt") as stream:
        return dict(stream.metadata() or {})


def _visibility(transformer: Any) -> Visibility:
    return "isolated" if is_isolated(transformer) else "full"


def _transformer_name(family: Family) -> str:
    name: str = diffusers_class(family.pipeline_class_name).transformer_name
    return name


def _json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings with sets as sorted lists, which JSON can hold."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
