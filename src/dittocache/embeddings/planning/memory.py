"""The keys of the last plan of a data set, so that only samples whose files changed are worked out again.

What a key depends on has two parts. What all samples share (family, encoders, sizes, treatment, versions, ...) is the
`context`: another one, and the memory does not count. What is a sample's own (the contents and sizes of its files) is a
row of bytes (`FileSamples.prints`): another one, and that sample is worked out again. Besides, some samples of every
shape are worked out anew each time and must come out as remembered.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dittocache.data.columns import Columns, load_columns, save_columns
from dittocache.data.digests import DIGEST_BYTES, hash_file
from dittocache.data.file_samples import FileSamples, Prints
from dittocache.embeddings import recipe
from dittocache.embeddings.planning.keys import KeyMaker
from dittocache.embeddings.planning.keytable import KeyTable, Numbers, Row
from dittocache.embeddings.planning.manifest import check_table, shapes_from_json, shapes_to_json
from dittocache.embeddings.recipe import SCHEMA, canonical_json, canonical_key
from dittocache.errors import DataError

MEMORY_VERSION = 1
CHECKED = 64  # samples worked out anew though remembered, and one of each shape besides
CHECKED_SHAPES = 64


@dataclass(frozen=True)
class KeyMemory:
    """The samples of the last plan: their keys, and the prints that these stand for."""

    table: KeyTable
    prints: Prints

    @classmethod
    def load(cls, path: Path, context: str) -> KeyMemory | None:
        """What was remembered; None when there is none for this context, or it is damaged."""
        try:
            head, columns = load_columns(path)
            if (head["version"], head["context"]) != (MEMORY_VERSION, context):
                return None
            table = KeyTable(
                head["names"],
                shapes_from_json(head),
                columns["shape_of"].astype(np.int64, copy=False),
                columns["keys"].reshape(-1, DIGEST_BYTES),
                columns["contents"].reshape(-1, DIGEST_BYTES),
            )
            check_table(table)
            prints = columns["prints"].reshape(len(table.names), -1)
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None  # everything in it can be worked out again
        return cls(table, prints)

    def save(self, path: Path, context: str) -> list[str]:
        """Write it; returns a note when it cannot be written: only time is lost."""
        head: dict[str, Any] = {
            "version": MEMORY_VERSION,
            "context": context,
            **shapes_to_json(self.table.shapes),
            "names": list(self.table.names),
        }
        columns: Columns = {
            "shape_of": self.table.shape_of,
            "keys": self.table.keys,
            "contents": self.table.contents,
            "prints": self.prints,
        }
        try:
            save_columns(path, head, columns)
        except OSError as error:
            return [f"keys will be worked out again by the next plan: {path} ({error.strerror or error})"]
        return []


def plan_files(
    samples: FileSamples, maker: KeyMaker, folder: Path, model: str | Path
) -> tuple[KeyTable, list[str], list[str]]:
    """The keys of a set's samples, what is wrong with those that have none, and notes.

    Args:
        folder: where memories are; each set of samples has one for each model.
    """
    set_name = [samples.place, samples.treatment.prefix]
    place = canonical_key(canonical_json([*set_name, maker.family.name, str(model)]))
    path, context = folder / f"keys-{place}.columns", context_of(samples, maker)
    samples.read_digests()
    problems: list[str] = []
    for row in np.flatnonzero(~samples.table.digested).tolist():
        problems += _digest_problem(samples, row)
    if problems:
        return KeyTable.of([]), problems, []
    prints = samples.prints()
    memory = KeyMemory.load(path, context)
    remembered = np.full(len(samples), -1, np.int64) if memory is None else _remembered(memory, samples, prints)
    if memory is not None and not _holds(memory, samples, remembered, maker):
        memory, remembered = None, np.full(len(samples), -1, np.int64)
    fresh: list[Row] = []
    anew = np.flatnonzero(remembered < 0)
    for number in anew.tolist():
        try:
            fresh.append(maker.row(samples[number]))
        except DataError as error:
            problems.append(str(error))
    if problems:
        return KeyTable.of([]), problems, []
    table = KeyTable.of(fresh) if memory is None else _merged(memory.table, remembered, anew, fresh)
    unchanged = memory is not None and table is memory.table
    return table, problems, [] if unchanged else KeyMemory(table, prints).save(path, context)


def context_of(samples: FileSamples, maker: KeyMaker) -> str:
    """Digest of everything that the keys of all samples depend on."""
    code = inspect.getsourcefile(type(maker.family))
    context = {
        "dittocache": version("dittocache"),
        "schema": SCHEMA,
        "family": maker.family.name,
        "code": None if code is None else hash_file(Path(code)),
        "encoders": dict(maker.identities),
        "libraries": {name: recipe.library_version(name) for name in ("diffusers", "transformers")},
        "sizes": asdict(maker.sizes),
        "storage": asdict(maker.storage),
        "variants": [asdict(variant) for variant in samples.treatment.variants],
        "wording": asdict(samples.treatment.wording),
    }
    return canonical_key(canonical_json(context))


def _digest_problem(samples: FileSamples, row: int) -> list[str]:
    """Why a file that samples are made of has no digest; nothing for a file of no sample."""
    layout = samples.layout
    used = (layout.targets, layout.captions, layout.masks, layout.controls)
    if not any((rows == row).any() for rows in used):
        return []
    try:
        samples.table.digest(row)
    except DataError as error:
        return [str(error)]
    return []


def _remembered(memory: KeyMemory, samples: FileSamples, prints: Prints) -> Numbers:
    """For each sample its number in the memory; -1 where it is new there or anything of it changed."""
    names = samples.names
    if memory.prints.shape[1:] != prints.shape[1:]:
        return np.full(len(names), -1, np.int64)
    if names == memory.table.names:
        numbers = np.arange(len(names))
    else:
        numbers = np.array([memory.table.row_of.get(name, -1) for name in names], np.int64)
    known = np.flatnonzero(numbers >= 0)
    changed = known[(prints[known] != memory.prints[numbers[known]]).any(axis=1)]
    numbers[changed] = -1
    return numbers


def _holds(memory: KeyMemory, samples: FileSamples, remembered: Numbers, maker: KeyMaker) -> bool:
    """Whether some samples, worked out anew, come out as remembered: a guard against what `context` does not tell."""
    known = np.flatnonzero(remembered >= 0)
    spread = known[np.linspace(0, len(known) - 1, min(CHECKED, len(known)), dtype=np.int64)]
    _, first = np.unique(memory.table.shape_of[remembered[known]], return_index=True)
    for number in {*spread.tolist(), *known[first[:CHECKED_SHAPES]].tolist()}:
        row = int(remembered[number])
        try:
            anew = KeyTable.of([maker.row(samples[number])])
        except DataError:
            return False
        if anew.keys_of(0) != memory.table.keys_of(row):
            return False
    return True


def _merged(memory: KeyTable, remembered: Numbers, anew: Numbers, fresh: list[Row]) -> KeyTable:
    """Remembered and fresh samples together, in order."""
    if not fresh and np.array_equal(remembered, np.arange(len(memory.names))):
        return memory
    kept = np.flatnonzero(remembered >= 0)
    joined = memory.take(remembered[kept]).joined(KeyTable.of(fresh))
    order = np.empty(len(remembered), np.int64)
    order[kept] = np.arange(len(kept))
    order[anew] = np.arange(len(anew)) + len(kept)
    return joined.take(order)
