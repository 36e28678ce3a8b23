"""The prompts of the pictures made while a LoRA is trained, as embeddings: from the cache, else encoded beforehand."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dittocache.data.sample import Sample
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.errors import RecordCorruptError, RecordMissingError
from dittocache.families.base import Tensors
from dittocache.jobs.edits import Edit
from dittocache.jobs.inputs import RunInputs, load_manifest, text_encoders
from dittocache.jobs.live_encoders import LiveEncoders

PROMPT_ARTIFACTS = ("prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds")  # named as the pipelines' arguments
NEGATIVE = "negative_"  # how the names of the same arguments begin for the unconditional branch

PromptArguments = Mapping[str, torch.Tensor | None]
"""Arguments of a pipeline that stand for its prompt: tensors with a batch axis of one, on the CPU."""


@dataclass(frozen=True)
class _Row:
    """One prompt of one edit: `prefix` is empty or `NEGATIVE`."""

    edit: Edit
    prefix: str
    prompt: str


def picture_prompts(inputs: RunInputs, edits: Sequence[Edit], device: str) -> dict[str, PromptArguments]:
    """By the edit's name, the arguments that stand for its prompt, and for the negative prompt where guidance is on.

    What is not in the cache (held-out pictures, prompts of one's own, negative prompts) is encoded here, once; the text
    encoders are gone from memory when this returns. To be called before the transformer is loaded.

    Args:
        device: where text encoders run that have no device of their own in `cache.devices`.

    Raises DataError naming a reference picture that cannot be read.
    """
    cached = cached_prompts(inputs, edits)
    rows = [_Row(edit, "", edit.prompt) for edit in edits if edit.name not in cached]
    settings = inputs.config.generate
    if settings.true_cfg_scale > 1:
        rows += [_Row(edit, NEGATIVE, settings.negative_prompt) for edit in edits]
    found: dict[str, dict[str, torch.Tensor | None]] = {edit.name: dict(cached.get(edit.name, {})) for edit in edits}
    for row, tensors in zip(rows, _encoded(inputs, rows, device), strict=True):
        found[row.edit.name] |= _arguments(tensors, row.prefix)
        if row.prefix:
            found[row.edit.name]["negative_prompt"] = None  # pipelines refuse words beside their embedding
    return dict(found)


def cached_prompts(inputs: RunInputs, edits: Sequence[Edit]) -> dict[str, dict[str, torch.Tensor]]:
    """The arguments of the edits that are training samples, as they are, and whose prompts are in the cache."""
    if not inputs.config.cache.use_cache:
        return {}
    wanted = {edit.name: edit for edit in edits}
    same = [
        sample.name
        for sample in inputs.samples
        if (edit := wanted.get(sample.name)) is not None
        and not sample.flipped
        and (sample.controls, sample.prompt) == (edit.images, edit.prompt)
        and sample.control_resolution == edit.control_resolution
    ]
    manifest = load_manifest(inputs)
    reader = CachedSamples(inputs.store, manifest)
    found = {}
    for name in same:
        artifacts = [one for one in PROMPT_ARTIFACTS if one in manifest.samples.get(name, {})]
        try:
            tensors = {one: reader.artifact(name, one) for one in artifacts}
        except (RecordMissingError, RecordCorruptError):
            continue
        if tensors:
            found[name] = _arguments(tensors, "")
    return found


def _encoded(inputs: RunInputs, rows: Sequence[_Row], device: str) -> list[Tensors]:
    """The text encoders' artifacts of each row; each encoder is loaded, used and dropped before the next one."""
    merged: list[Tensors] = [{} for _ in rows]
    if not rows:
        return merged
    samples = [_stand_in(row) for row in rows]
    for encoder in text_encoders(inputs.family):
        pipe = LiveEncoders(inputs, device)[str(encoder)]
        parts = inputs.family.encode(pipe, encoder, samples, inputs.sizes, wanted=[set(PROMPT_ARTIFACTS)] * len(rows))
        for tensors, part in zip(merged, parts, strict=True):
            tensors |= {name: one.cpu() for name, one in part.items()}
        del pipe, parts
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return merged


def _stand_in(row: _Row) -> Sample:
    """The edit as a sample, of which only the words and the references count for a text encoder."""
    edit = row.edit
    size = edit.size or (0, 0)
    resolution = edit.control_resolution
    return Sample(edit.name, edit.target or Path(), edit.images, row.prompt, size, control_resolution=resolution)


def _arguments(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: one.unsqueeze(0) for name, one in tensors.items() if name in PROMPT_ARTIFACTS}
