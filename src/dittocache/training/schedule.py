"""What happens at which step, as functions of numbers: sample order, noise, sigmas, caption dropout.

Everything random about a sample is drawn from a generator that depends on the seed, the step and the sample's place
in the step's batch alone. A resumed run goes on exactly as an uninterrupted one would have, and a batch of eight is the
same batch whether one process takes it at once, in four parts, or eight processes take one sample each.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from types import MappingProxyType

import torch

from dittocache.errors import DataError
from dittocache.training.config import TrainConfig

NO_REPEATS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class MicroBatch:
    """Samples that pass the transformer together, and their places in the step's batch."""

    names: tuple[str, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """What chance decides about one sample: noise `(N, C)` float32, sigma in (0, 1), whether its caption is dropped."""

    noise: torch.Tensor
    sigma: torch.Tensor
    drop_caption: bool


def sample_seed(seed: int, step: int, place: int) -> int:
    """A 63-bit seed for one sample of one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # seeds are signed 64-bit numbers


def draw(config: TrainConfig, step: int, place: int, shape: tuple[int, ...], caption_dropout: float) -> Draws:
    """The draws for the sample at `place` of a step's batch, on the CPU, so that every device sees the same numbers.

    Args:
        shape: of the sample's packed latents, `(N, C)`.
    """
    generator = torch.Generator().manual_seed(sample_seed(config.seed, step, place))
    drop = float(torch.rand((), generator=generator)) < caption_dropout
    sigma = draw_sigmas(config, 1, shape[0], generator)[0]
    return Draws(torch.randn(shape, generator=generator), sigma, drop)


def draw_sigmas(config: TrainConfig, size: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels `(size,)` float32 in (0, 1) of the configured distribution, for pictures of `tokens` tokens.

    Logit-normal: Esser et al. 2024 (arXiv:2403.03206), section 3.1; shift: their equation 23.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    normal = config.timestep_sampling in ("logit_normal", "resolution_shifted")
    u: torch.Tensor = compute_density_for_timestep_sampling(
        "logit_normal" if normal else "none",
        size,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        generator=generator,
    )
    shift = timestep_shift(config, tokens)
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


def timestep_shift(config: TrainConfig, tokens: int) -> float:
    """The factor s of sigma = s u / (1 + (s - 1) u) for pictures of `tokens` tokens; 1 where nothing is shifted."""
    if config.timestep_sampling == "shifted":
        return config.timestep_shift
    if config.timestep_sampling == "resolution_shifted":
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        return math.exp(calculate_shift(tokens, *config.shift_tokens, *config.shift_exponents))
    return 1.0


def with_steps(config: TrainConfig, epoch_length: int, processes: int) -> TrainConfig:
    """The settings with `steps` in place of `epochs`: as many as it takes to see everything that often.

    Args:
        epoch_length: samples that an epoch holds, each counted as often as it is repeated.
        processes: that share the work.
    """
    if config.epochs is None:
        return config
    batch = config.batch_size * config.gradient_accumulation_steps * processes
    return config.model_copy(update={"epochs": None, "steps": max(1, math.ceil(config.epochs * epoch_length / batch))})


def epoch_length(names: Sequence[str], repeats: Mapping[str, int]) -> int:
    """How many samples an epoch holds; one without an entry in `repeats` counts once."""
    return sum(repeats.get(name, 1) for name in names)


def global_batches(
    buckets: Mapping[str, object], size: int, seed: int, repeats: Mapping[str, int] = NO_REPEATS
) -> Iterator[list[str]]:
    """The names of each step's samples, `size` a step, without end.

    Args:
        buckets: sample name -> what samples that pass the transformer together must have in common.
        repeats: how often a sample comes in an epoch; once where it has no entry.

    Each epoch shuffles the samples within their buckets, cuts batches of one bucket, and shuffles the batches. What is
    left of the buckets makes batches of mixed buckets; what is left of these comes first in the next epoch, so that
    all batches are full and all samples are seen equally often. Raises DataError where there are no samples.
    """
    if not buckets:
        raise DataError("no samples to train on; the data set is empty or none of its samples could be encoded")
    carried: list[str] = []
    for epoch in count():
        rng = random.Random(f"order/{seed}/{epoch}")
        groups: dict[object, list[str]] = {}
        for name in sorted(buckets):
            groups.setdefault(buckets[name], []).extend([name] * repeats.get(name, 1))
        batches, remainders = [], []
        for names in groups.values():
            rng.shuffle(names)
            whole = len(names) // size * size
            batches += [names[at : at + size] for at in range(0, whole, size)]
            remainders.append(names[whole:])
        rng.shuffle(remainders)
        rest = [*carried, *(name for names in remainders for name in names)]
        whole = len(rest) // size * size
        batches += [_by_bucket(rest[at : at + size], buckets) for at in range(0, whole, size)]
        carried = rest[whole:]
        rng.shuffle(batches)
        yield from batches


def micro_batches(
    names: Sequence[str], buckets: Mapping[str, object], batch_size: int, rank: int = 0, world: int = 1
) -> list[MicroBatch]:
    """What process `rank` of `world` passes through the transformer, in order: its share of a step's batch `names`.

    Each holds at most `batch_size` samples of one bucket.
    """
    share = len(names) // world
    places = range(rank * share, (rank + 1) * share)
    parts = []
    for _, run in groupby(places, key=lambda place: buckets[names[place]]):
        same = list(run)
        parts += [same[at : at + batch_size] for at in range(0, len(same), batch_size)]
    return [MicroBatch(tuple(names[place] for place in part), tuple(part)) for part in parts]


def _by_bucket(names: Sequence[str], buckets: Mapping[str, object]) -> list[str]:
    """The same names with those of one bucket together."""
    first: dict[object, int] = {}
    for position, name in enumerate(names):
        first.setdefault(buckets[name], position)
    return sorted(names, key=lambda name: first[buckets[name]])
