"""Samples from a list: a table, a folder of pictures with metadata, a Hugging Face data set."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

from dittocache.data.checks import sample_problems
from dittocache.data.config import SetConfig
from dittocache.data.file_memory import remember, remembered
from dittocache.data.file_samples import FileSamples
from dittocache.data.file_table import FileTable
from dittocache.data.layout import ABSENT, Layout, layout_of
from dittocache.data.listed.entry import Entry
from dittocache.data.listed.listing import read_listing
from dittocache.data.variants import Treatment
from dittocache.errors import DataError


def load_listed(config: SetConfig, treatment: Treatment, memory: Path | None) -> FileSamples:
    """The samples of the list at `config.path`, in its order.

    Args:
        memory: folder in which what is read is remembered for the next time; None for nowhere.

    Raises DataError listing every problem of the list and of the pictures that it names.
    """
    problems: list[str] = []
    samples = read_listed(config, treatment, memory, problems)
    if problems:
        raise DataError(f"the data set {config.path} has {len(problems)} problem(s)", list(dict.fromkeys(problems)))
    return samples


def read_listed(config: SetConfig, treatment: Treatment, memory: Path | None, problems: list[str]) -> FileSamples:
    """As `load_listed`, samples that cannot be used included: what is wrong goes to `problems`.

    Raises DataError where the list itself cannot be read.
    """
    entries = read_listing(config.path, config, memory, problems)
    table = FileTable.of_files(chain.from_iterable(map(_files, entries)))
    place = json.dumps(["list", str(config.path.absolute())])
    table.learn(remembered(memory, place, table.root)[0])
    samples = FileSamples(table, _layout(entries, table), treatment, place, memory)
    problems += sample_problems(samples, None, config.caption_extension)
    if not problems and not len(samples):
        problems.append(f"{config.path} lists no sample; expected at least one row with a target picture and a prompt")
    remember(samples)
    return samples


def _layout(entries: list[Entry], table: FileTable) -> Layout:
    places = {file: os.path.abspath(file) for file in set(chain.from_iterable(map(_files, entries)))}
    start = len(os.fspath(table.root))
    rows = {file: table.row_of[place[start:]] for file, place in places.items()}
    return layout_of(
        [one.name for one in entries],
        [rows[one.target] for one in entries],
        [ABSENT] * len(entries),
        [ABSENT if one.mask is None else rows[one.mask] for one in entries],
        [[rows[file] for file in one.controls] for one in entries],
        [one.prompt for one in entries],
    )


def _files(entry: Entry) -> list[Path]:
    return [entry.target, *entry.controls, *([entry.mask] if entry.mask is not None else [])]
