"""What happens at which step, as functions of numbers: sample order, noise, sigmas, dropout, learning rate.

Everything random at a step is drawn from a generator that depends on the seed, the step and the process alone, so a
resumed run goes on exactly as an uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from dittocache.errors import DataError
from dittocache.training.config import TrainConfig

LOGIT_MEAN, LOGIT_STD = 0.0, 1.0  # Esser et al. 2024 (arXiv:2403.03206), section 3.1


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """A CPU generator for one step of one process; on the CPU, so that every device sees the same numbers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # seeds are signed 64-bit numbers


def draw_sigmas(config: TrainConfig, count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels `(count,)` float32 in (0, 1) of the configured distribution."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheme = "logit_normal" if config.timestep_sampling == "logit_normal" else "none"
    u: torch.Tensor = compute_density_for_timestep_sampling(
        scheme, count, logit_mean=LOGIT_MEAN, logit_std=LOGIT_STD, generator=generator
    )
    if config.timestep_sampling == "shifted":
        shift = config.timestep_shift
        u = shift * u / (1 + (shift - 1) * u)
    return u


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine to zero.

    The warm-up starts above zero, so that no step is spent on nothing; it takes at most half of a short run.
    """
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(config.steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def batches_from(
    buckets: Mapping[str, object], batch_size: int, seed: int, start: int, count: int, rank: int = 0, world: int = 1
) -> Iterator[list[str]]:
    """Names of the samples of steps `start` ... `start + count - 1` for one process.

    Args:
        buckets: sample name -> what samples of one batch must have in common.

    Each epoch shuffles the samples within their buckets, cuts batches, and shuffles the batches; a bucket's last
    batch may be smaller. Of the batches of all epochs, in order, process `rank` of `world` takes every `world`-th.
    Raises DataError where there are no samples.
    """
    if not buckets:
        raise DataError("no samples to train on; the data set is empty or none of its samples could be encoded")
    first, epoch, position = start * world + rank, 0, 0
    wanted = count
    while wanted > 0:
        order = _epoch(buckets, batch_size, seed, epoch)
        for names in order:
            if position >= first and (position - first) % world == 0 and wanted > 0:
                wanted -= 1
                yield names
            position += 1
        epoch += 1


def _epoch(buckets: Mapping[str, object], batch_size: int, seed: int, epoch: int) -> Sequence[list[str]]:
    rng = random.Random(f"order/{seed}/{epoch}")
    groups: dict[object, list[str]] = {}
    for name in sorted(buckets):
        groups.setdefault(buckets[name], []).append(name)
    batches = []
    for names in groups.values():
        rng.shuffle(names)
        batches += [names[at : at + batch_size] for at in range(0, len(names), batch_size)]
    rng.shuffle(batches)
    return batches
