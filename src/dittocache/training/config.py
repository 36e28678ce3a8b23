"""Settings of the `train` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dittocache.settings import Settings


class TrainConfig(Settings):
    """LoRA fine-tuning."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""

    batch_size: int = Field(default=1, ge=1)
    """Samples a step."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""

    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up; a cosine to zero follows."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank."""

    alpha: int | None = Field(default=None, ge=1)
    """LoRA alpha; the rank when left out."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping."""

    timestep_sampling: Literal["uniform", "logit_normal", "shifted"] = "logit_normal"
    """How sigma is drawn."""

    timestep_shift: float = Field(default=1.0, gt=0)
    """Shift s of `shifted`: sigma = s u / (1 + (s - 1) u)."""

    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between saved LoRA checkpoints."""

    seed: int = 0
    """Seed of noise, timesteps and sample order."""
