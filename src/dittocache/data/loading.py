"""From the `data` section to samples, whatever form the data sets have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dittocache.data.config import DataConfig
from dittocache.data.file_samples import FileSamples
from dittocache.data.folder import folder_place, is_folder_of_targets, read_place
from dittocache.data.listed.kinds import kind_of
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
    parts: list[FileSamples] = []
    treated = treated_sets(config, size_multiple, problems)
    for source, treatment in treated:
        found: list[str] = []
        try:
            parts.append(read_set(source, treatment, memory, found))
        except DataError as error:
            if len(treated) == 1 and not problems:
                raise
            found += error.problems or [str(error)]
        problems += found
    problems += name_problems(parts)
    if problems:
        which = ", ".join(str(path) for path in config.paths)
        raise DataError(f"the data in {which} has {len(problems)} problem(s)", list(dict.fromkeys(problems)))
    return parts[0] if len(parts) == 1 else SampleSets(parts)


def treated_sets(config: DataConfig, size_multiple: int, problems: list[str]) -> list[tuple[SetSource, Treatment]]:
    """Every set with what is made of its samples; what is wrong with the settings goes to `problems`."""
    sources = _sources(config, problems)
    names = set_names([one.config.path for one in sources])
    treated = []
    for source, name in zip(sources, names, strict=True):
        step = source.config.bucket_step
        if step is not None and step % size_multiple:
            problems.append(f"found bucket_step {step}; this model needs a multiple of {size_multiple}")
        prefix = f"{name}/" if len(sources) > 1 else ""
        treated.append((source, treatment_of(source.config, size_multiple, config.side, prefix)))
    return treated


def read_set(source: SetSource, treatment: Treatment, memory: Path | None, problems: list[str]) -> FileSamples:
    """The samples of one set, those that cannot be used included: what is wrong with them goes to `problems`.

    Raises DataError where there are no samples to speak of: no such folder, a list that cannot be read.
    """
    config = source.config
    if not _is_folder(source):
        from dittocache.data.listed_samples import read_listed

        if config.control_path is not None:
            raise DataError(f"control_path is for folders; {config.path} names its own control pictures: leave it out")
        samples = read_listed(config, treatment, memory, problems)
    else:
        samples = read_place(folder_place(config, source.flat), treatment, memory, problems)
        if config.columns:
            samples.notes.append(f"{config.path} is a folder and has no columns: the setting does not count for it")
    samples.notes += source.notes
    return samples


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


def _is_folder(source: SetSource) -> bool:
    path = source.config.path
    return source.flat or is_folder_of_targets(path) or kind_of(path) == "folder"


def notes_of(samples: Sequence[object]) -> list[str]:
    """What the user should know of a data set besides."""
    return samples.notes if isinstance(samples, (FileSamples, SampleSets)) else []
