"""Whether an imported tensor is what the plan's encoder would have made, up to rounding."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.findings import Comparison
from dittocache.embeddings.foreign.matching import Matcher, Wanted
from dittocache.embeddings.planning.plan import Plan
from dittocache.embeddings.store.storage import base_key_of, storage_error
from dittocache.errors import CacheError, DataError
from dittocache.events import EventLog
from dittocache.families.base import Tensors

# Float16 beside bfloat16 differs by 2 to 3 % in the last layer of a large language model; another prompt template, or
# weights of another version, by far more.
LARGEST_RELATIVE_RMS = 0.05
SMALLEST_TOKEN_COSINE = 0.99


def compare(sample: str, artifact: str, imported: torch.Tensor, computed: torch.Tensor) -> Comparison:
    """Both numbers of a pair of tensors; masks and shapes have to be equal."""
    computed = computed.detach().cpu()
    if imported.shape != computed.shape:
        return Comparison(sample, artifact, math.inf, -1.0)
    if not imported.is_floating_point() or not computed.is_floating_point():
        same = torch.equal(imported, computed)
        return Comparison(sample, artifact, 0.0 if same else math.inf, 1.0 if same else -1.0)
    error = storage_error(computed, imported)
    return Comparison(sample, artifact, error.relative_rms, error.worst_token_cosine)


def agrees(one: Comparison) -> bool:
    """Whether the difference is no more than rounding makes."""
    return one.relative_rms <= LARGEST_RELATIVE_RMS and one.worst_token_cosine >= SMALLEST_TOKEN_COSINE


def refuse_disagreement(tool: str, comparisons: Sequence[Comparison]) -> None:
    """Raise CacheError naming every pair that does not agree."""
    different = [one for one in comparisons if not agrees(one)]
    if different:
        raise CacheError(
            f"the cache of {tool} is not what this model's encoders make of this data set; nothing was imported. "
            f"Expected a relative RMS of at most {LARGEST_RELATIVE_RMS} and a token cosine of at least "
            f"{SMALLEST_TOKEN_COSINE}: choose the model, resolution and settings it was cached with, or cache anew",
            [
                f"{one.sample}, {one.artifact}: relative RMS {one.relative_rms:.3g}, worst token cosine "
                f"{one.worst_token_cosine:.4f}"
                if math.isfinite(one.relative_rms)
                else f"{one.sample}, {one.artifact}: not the same shape, or another mask"
                for one in different
            ],
        )


def compare_samples(
    matcher: Matcher, plan: Plan, count: int, device: str | torch.device, log: EventLog
) -> list[Comparison]:
    """Foreign tensors of `count` samples, spread over the data set, beside freshly encoded ones."""
    found = _usable(matcher, plan, count)
    comparisons: list[Comparison] = []
    for encoder, beside in matcher.family.encoders.items():
        chosen = [(sample, tensors[encoder]) for sample, tensors in found if encoder in tensors]
        if not chosen:
            continue
        log.message(f"encoding {len(chosen)} samples with {encoder} to compare")
        pipe = matcher.family.load_pipeline(plan.model, [encoder, *beside], plan.dtype, device)
        for sample, tensors in chosen:
            [computed] = matcher.family.encode(pipe, encoder, [sample], plan.sizes)
            comparisons += [compare(sample.name, name, tensor, computed[name]) for name, tensor in tensors.items()]
        del pipe
        gc.collect()
    return comparisons


def _usable(matcher: Matcher, plan: Plan, count: int) -> list[tuple[Sample, dict[str, Tensors]]]:
    """The tensors by encoder of `count` samples that have any."""
    by_sample: dict[str, list[Wanted]] = {}
    for one in matcher.wanted():
        if plan.recipe(one.key)["encoder"] is not None:
            by_sample.setdefault(one.sample.name, []).append(one)
    names = list(by_sample)
    step = max(len(names) // count, 1)
    # Where a sample has nothing usable, one in between takes its place.
    order = [*names[::step], *(name for index, name in enumerate(names) if index % step)]
    found: list[tuple[Sample, dict[str, Tensors]]] = []
    for name in order:
        tensors: dict[str, Tensors] = {}
        for one in by_sample[name]:
            recipe = plan.recipe(one.key)
            try:
                foreign = matcher.read(one, [base_key_of(recipe)])
            except (CacheError, DataError):
                continue  # the import itself reports it
            tensors.setdefault(str(recipe["encoder"]["component"]), {})[one.artifact] = foreign.tensor
        if tensors:
            found.append((by_sample[name][0].sample, tensors))
        if len(found) == count:
            break
    return found
