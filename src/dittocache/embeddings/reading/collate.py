"""Samples of one batch as tensors with a batch axis, padded and masked where their lengths differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dittocache.errors import DataError
from dittocache.families.base import Tensors

MASK = "_mask"
PROMPTS = "prompt_embeds"

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Column:
    """One entry of a batch.

    Attributes:
        dtype, shape: of the whole entry, `(B, ...)`.
        lengths: for each sample, how many rows are its own; None where samples are not padded.
        made: it is a mask that no sample brings along.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    made: bool = False


def columns(names: Sequence[str], samples: Sequence[Shapes]) -> dict[str, Column]:
    """What the batch of these samples looks like, by artifact.

    Artifacts of one shape are stacked, `(B, ...)`. Those that differ in their first axis are padded with zeros,
    `(B, T_max, ...)`, and have a mask `ARTIFACT_mask` `(B, T_max)` bool beside them, True where a row is the sample's
    own: the stored one where there is one, else a new one. Sequences of prompt embeddings always have a mask.

    Raises DataError, naming the samples, when they do not go into one batch.
    """
    found = {artifact: _column(artifact, names, samples) for artifact in _artifacts(names, samples)}
    for artifact, column in list(found.items()):
        mask = artifact + MASK
        if mask in found:
            _check_mask(artifact, names, samples)
            found[mask] = replace(found[mask], dtype=torch.bool)
        elif not artifact.endswith(MASK) and (column.lengths is not None or _is_prompt(artifact, column)):
            lengths = tuple(sample[artifact][1][0] for sample in samples)
            found[mask] = Column(torch.bool, column.shape[:2], lengths, made=True)
    return found


def collate(names: Sequence[str], samples: Sequence[Tensors]) -> Tensors:
    """The samples as one batch, as `columns` describes it; raises DataError as it does."""
    shapes = [{name: (one.dtype, tuple(one.shape)) for name, one in sample.items()} for sample in samples]
    plan = columns(names, shapes)
    batch = {artifact: torch.empty(column.shape, dtype=column.dtype) for artifact, column in plan.items()}
    fill_masks(batch, plan)
    for index, sample in enumerate(samples):
        for artifact, tensor in sample.items():
            target = own_rows(batch[artifact], plan[artifact], index)
            target.copy_(tensor != 0 if target.dtype == torch.bool else tensor)
    return batch


def own_rows(entry: torch.Tensor, column: Column, index: int) -> torch.Tensor:
    """The part of a batch's entry that a sample fills; what is beyond it becomes zero."""
    row = entry[index]
    if column.lengths is None:
        return row
    row[column.lengths[index] :].zero_()
    return row[: column.lengths[index]]


def fill_masks(batch: Tensors, plan: Mapping[str, Column]) -> None:
    """Fill the masks that no sample brings along."""
    for artifact, column in plan.items():
        if column.made and column.lengths is not None:
            for row, length in zip(batch[artifact], column.lengths, strict=True):
                row[:length] = True
                row[length:] = False


def _is_prompt(artifact: str, column: Column) -> bool:
    return artifact.endswith(PROMPTS) and len(column.shape) == 3


def _artifacts(names: Sequence[str], samples: Sequence[Shapes]) -> Sequence[str]:
    if not samples:
        raise DataError("a batch needs at least one sample")
    for name, sample in zip(names, samples, strict=True):
        if different := set(sample) ^ set(samples[0]):
            raise DataError(
                f"samples {names[0]!r} and {name!r} do not go into one batch: only one of them has "
                f"{', '.join(sorted(different))}; cache the data set again with one family and one set of settings"
            )
    return list(samples[0])


def _column(artifact: str, names: Sequence[str], samples: Sequence[Shapes]) -> Column:
    dtype, shape = samples[0][artifact]
    for name, sample in zip(names, samples, strict=True):
        other_dtype, other = sample[artifact]
        if other_dtype != dtype or len(other) != len(shape) or other[1:] != shape[1:]:
            raise DataError(
                f"{artifact} of samples {names[0]!r} ({dtype}, {list(shape)}) and {name!r} ({other_dtype}, "
                f"{list(other)}) does not go into one batch; batch samples of one bucket"
            )
    lengths = tuple(sample[artifact][1][0] for sample in samples) if shape else ()
    if len(set(lengths)) <= 1:
        return Column(dtype, (len(samples), *shape))
    return Column(dtype, (len(samples), max(lengths), *shape[1:]), lengths)


def _check_mask(artifact: str, names: Sequence[str], samples: Sequence[Shapes]) -> None:
    for name, sample in zip(names, samples, strict=True):
        mask = sample[artifact + MASK][1]
        if mask != sample[artifact][1][:1]:
            raise DataError(
                f"sample {name!r}: {artifact}{MASK} has shape {list(mask)}, expected {list(sample[artifact][1][:1])} "
                f"as {artifact} has; cache the sample again"
            )
