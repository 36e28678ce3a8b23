"""The reference cache on a transformer for a `with`, a step taken twice, and a call of a tiny pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from dittocache.families.base import Sizes
from dittocache.families.qwen_image_sizes import pipeline_sizes
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import ReferenceKVHook, apply_reference_kv, remove_reference_kv

FROZEN = ReferenceKVConfig(refresh=(0,))
STEPS = 4
PICTURE = Image.effect_noise((64, 64), 50).convert("RGB")


@contextmanager
def reference_kv(target: Any, config: ReferenceKVConfig = FROZEN) -> Iterator[ReferenceKVHook]:
    hook = apply_reference_kv(target, config)
    try:
        yield hook
    finally:
        remove_reference_kv(target)


def twice(model: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same input as two steps of a run."""
    outputs = []
    for step in range(2):
        with model.cache_context("cond", step_index=step, num_inference_steps=4):
            outputs.append(model(**kwargs)[0])
    return outputs[0], outputs[1]


def edited(pipe: Any, **call: Any) -> torch.Tensor:
    """Latents of an edit of `PICTURE` by a tiny Qwen edit pipeline in `STEPS` steps, always from the same noise."""
    embeds = torch.randn(1, 6, pipe.transformer.config.joint_attention_dim, generator=torch.Generator().manual_seed(3))
    with pipeline_sizes(Sizes(resolution=64, condition_resolution=64)):
        made: torch.Tensor = pipe(
            image=PICTURE,
            prompt_embeds=embeds,
            prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
            width=64,
            height=64,
            num_inference_steps=STEPS,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **call,
        ).images
    return made
