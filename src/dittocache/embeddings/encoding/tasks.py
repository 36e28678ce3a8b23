"""Which sample computes what: each missing record once, samples that suit each other side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dittocache.data.sample import Sample
from dittocache.embeddings.planning.plan import Need


@dataclass(frozen=True)
class Task:
    """What one sample has to pass the encoder for.

    Attributes:
        sample: the sample.
        keys: artifact name -> key, of the records that it is to make; others of its records are there, or made by
            another sample.
    """

    sample: Sample
    keys: dict[str, str]


def bucket_of(encoder: str | None, sample: Sample) -> tuple[Any, ...]:
    """What samples have in common that pass `encoder` well together: picture size, or pictures shown and words."""
    if encoder is None or not encoder.startswith("text_encoder"):
        return (*sample.size, len(sample.controls))
    return (len(sample.controls),)


def in_order(needs: Iterable[Need], encoder: str | None) -> list[Need]:
    """The needs bucket by bucket, prompts of like length side by side; the order follows from the samples alone."""

    def rank(need: Need) -> tuple[Any, ...]:
        words = 0 if encoder in ("vae", None) else len(need.sample.prompt)
        return (*bucket_of(encoder, need.sample), words)

    return sorted(needs, key=rank)


def make_tasks(needs: Iterable[Need], covered: Callable[[str], bool], failed: Collection[str]) -> list[Task]:
    """One task for each sample that has to make a record; a record that samples share is made by the first of them.

    Args:
        covered: whether the record of a key is there, or on its way.
        failed: names of samples that cannot be encoded; another sample that shares a record makes it instead.
    """
    taken: set[str] = set()
    tasks = []
    for need in needs:
        if need.sample.name in failed:
            continue
        keys = {name: key for name, key in need.keys.items() if key not in taken and not covered(key)}
        if keys:
            taken.update(keys.values())
            tasks.append(Task(need.sample, keys))
    return tasks


def next_batch(
    tasks: Sequence[Task],
    position: int,
    batch_size: int,
    bucket: Callable[[Task], Any],
    alone: Callable[[Task], bool],
) -> list[Task]:
    """The tasks from `position` on that the encoder takes at once: of one bucket, and no other beside one `alone`."""
    first = tasks[position]
    if alone(first):
        return [first]
    batch = [first]
    for task in tasks[position + 1 : position + batch_size]:
        if alone(task) or bucket(task) != bucket(first):
            break
        batch.append(task)
    return batch
