"""Whether a run may go on from a checkpoint: what differs between then and now, and what follows from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dittocache.errors import ConfigError
from dittocache.families.base import Family
from dittocache.training.config import TrainConfig
from dittocache.training.schedule import NO_REPEATS

REFUSED = frozenset(
    {
        "family",
        "model",
        "rank",
        "alpha",
        "targets",
        "optimizer",
        "averaged",
        "base_quantization",
        "timestep_sampling",
        "reference_visibility",
    }
)
"""Other values of these make the saved weights or moments mean something else."""

FREE = frozenset(
    {
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "validation_prompts",
        "validation_pictures",
        "log_with",
        "offload",
        "gradient_checkpointing",
    }
)
"""What numbers do not depend on."""

SHARED = frozenset({"batch_size", "gradient_accumulation_steps", "processes"})
"""How a step's batch is divided; only its size matters."""

ONLY_IN_SCHEDULES = frozenset({"steps"})
"""What matters only where the learning rate goes down with the steps."""

MEANINGS = {
    "data": "the samples, their files, captions or repeats are not those that the checkpoint was trained on",
    "model": "the transformer's weights or its number format are not those that the checkpoint was trained on",
}
"""In words, what a difference of digests says."""


def run_settings(
    config: TrainConfig,
    family: Family,
    names: Sequence[str],
    caption_dropout: float,
    processes: int,
    identity: Mapping[str, str],
    repeats: Mapping[str, int] = NO_REPEATS,
) -> dict[str, Any]:
    """What a run's numbers depend on, as JSON values, to be stored in its checkpoints.

    Args:
        identity: digests of the `model` and of the `data`; a digest of the samples' names stands in for the data.
        repeats: how often a sample comes in an epoch; once where it has no entry.
    """
    lines = [f"{name}\t{repeats[name]}" if repeats.get(name, 1) > 1 else name for name in sorted(names)]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    alpha = config.alpha if config.alpha is not None else config.rank
    targets = config.lora_targets or family.lora_targets
    return {
        **config.model_dump(mode="json", exclude={"alpha"}),
        "alpha": alpha,
        "averaged": config.ema_decay is not None,
        "family": family.name,
        "targets": [targets] if isinstance(targets, str) else sorted(targets),
        "caption_dropout": caption_dropout,
        "processes": processes,
        "global_batch": config.batch_size * config.gradient_accumulation_steps * processes,
        "samples": len(names),
        "data": digest,
        **identity,
    }


def check_continuation(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: Path) -> list[str]:
    """What differs between a checkpoint's settings and this run's, a line each, where the run may go on.

    A run that goes on with such a difference is not what an uninterrupted one would have been. Raises ConfigError
    that lists the differences which make it no continuation at all.
    """
    saved = {"reference_visibility": "full", "self_distillation": 0.0, **saved}  # of before there was a choice
    ignored = set(FREE | SHARED)
    if saved.get("lr_schedule") == current.get("lr_schedule") == "constant":
        ignored |= ONLY_IN_SCHEDULES
    differing = sorted(name for name in {*saved, *current} - ignored if saved.get(name) != current.get(name))
    lines = {name: _line(name, saved, current) for name in differing}
    refused = [lines[name] for name in differing if name in REFUSED]
    if refused:
        raise ConfigError(
            f"cannot resume from {checkpoint}: its settings differ; restore them, or start anew under another name",
            refused,
        )
    return list(lines.values())


def _line(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    words = MEANINGS.get(name)
    found = f"the checkpoint has {saved.get(name)!r}, this run has {current.get(name)!r}"
    return f"{name}: {words} ({found})" if words else f"{name}: {found}"
