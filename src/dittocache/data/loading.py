"""From the `data` section to samples, whatever form the data sets have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dittocache.data.config import DataConfig
from dittocache.data.file_samples import FileSamples
from dittocache.data.folder import folder_place, load_place
from dittocache.data.sample_sets import SampleSets, name_problems, set_names
from dittocache.data.toml_sets import SetSource, read_toml_sets
from dittocache.data.variants import Treatment, treatment_of
from dittocache.errors import DataError

Samples = FileSamples | SampleSets


def load_samples(config: DataConfig, size_multiple: int, memory: Path | None) -> Samples:
    """The samples of all sets, those of a set in the order of their names (or of the table's rows).

    Where there are several sets, names begin with the set's.

    Args:
        size_multiple: the sides of buckets are multiples of this many pixels (`Family.size_multiple`).
        memory: folder in which what is read is remembered for the next time; None for nowhere.

    Raises DataError listing every problem of all sets.
    """
    problems: list[str] = []
    sources = _sources(config, problems)
    names = set_names([one.config.path for one in sources])
    parts: list[FileSamples] = []
    for source, name in zip(sources, names, strict=True):
        step = source.config.bucket_step
        if step is not None and step % size_multiple:
            problems.append(f"bucket_step: found {step}; this model needs a multiple of {size_multiple}")
        treatment = treatment_of(source.config, size_multiple, config.side, f"{name}/" if len(sources) > 1 else "")
        try:
            parts.append(_load(source, treatment, memory))
        except DataError as error:
            if len(sources) == 1 and not problems:
                raise
            problems += error.problems or [str(error)]
    problems += name_problems(parts)
    if problems:
        which = ", ".join(str(path) for path in config.paths)
        raise DataError(f"the data in {which} has {len(problems)} problem(s)", list(dict.fromkeys(problems)))
    return parts[0] if len(parts) == 1 else SampleSets(parts)


def _sources(config: DataConfig, problems: list[str]) -> list[SetSource]:
    """Every set, those of TOML files in the place of their file."""
    sources: list[SetSource] = []
    for one in config.every_set:
        if one.path.suffix.lower() != ".toml":
            sources.append(SetSource(one))
            continue
        try:
            sources += read_toml_sets(one.path, one, problems)
        except DataError as error:
            problems.append(str(error))
    return sources


def _load(source: SetSource, treatment: Treatment, memory: Path | None) -> FileSamples:
    config = source.config
    samples = load_place(folder_place(config, source.flat), treatment, memory)
    samples.notes += source.notes
    return samples


def notes_of(samples: Sequence[object]) -> list[str]:
    """What the user should know of a data set besides."""
    return samples.notes if isinstance(samples, (FileSamples, SampleSets)) else []
