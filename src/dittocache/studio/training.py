"""Starts and stops the draft's training, and lets one that ended go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dittocache.config import BUNDLED, RunConfig, load_config
from dittocache.data.listed.kinds import kind_of
from dittocache.errors import AccessError, ConfigError
from dittocache.jobs.background.starting import start_run
from dittocache.jobs.run_folder import CONFIG_NAME
from dittocache.jobs.stages import CACHE, TRAIN
from dittocache.settings import Settings
from dittocache.studio.state import Studio


def start_training(studio: Studio) -> Path:
    """Start the workflow of the draft and return the run's folder.

    Raises ConfigError listing every problem with the settings, StageError where a run is at work in that folder.
    """
    return _start(studio, checked_config(studio))


def start_caching(studio: Studio) -> Path:
    """Start only what comes before the training: check and encode what is missing; raises as `start_training`."""
    return start_run(checked_config(studio), CACHE, cwd=studio.base)


def resume_run(studio: Studio, run_dir: Path) -> Path:
    """Let a run go on where it stopped, with the settings in its folder; raises as `start_training`."""
    config = load_config(studio.path(run_dir) / CONFIG_NAME)
    problems = outside_problems(studio, config)
    if problems:
        raise ConfigError(f"{run_dir} cannot go on in this Studio", problems)
    return _start(studio, config)


def checked_config(studio: Studio) -> RunConfig:
    """The draft's settings; raises ConfigError listing every problem, paths outside the allowed folders among them."""
    config = studio.config()
    problems = outside_problems(studio, config)
    if problems:
        raise ConfigError(f"{len(problems)} path(s) are outside the Studio's folders", problems)
    return config


def outside_problems(studio: Studio, config: RunConfig) -> list[str]:
    """Each path of the settings that the Studio may not read or write, with its setting's name."""
    problems = []
    for name, path in _places(config):
        try:
            studio.path(path)
        except AccessError as error:
            problems.append(f"{name}: {error}")
    return problems


def _start(studio: Studio, config: RunConfig) -> Path:
    return start_run(config, TRAIN if config.cache.use_cache else ("validate", "train"), cwd=studio.base)


def _places(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Every path in the settings, with its name."""
    for name, path in _paths_in(config, ""):
        if kind_of(path) != "hub":
            yield name, path
    model = config.model.path
    if model != BUNDLED and (Path(model).exists() or model.startswith(("/", ".", "~"))):
        yield "model.path", Path(model)
    if config.teacache is not None and config.teacache.profile is not None:
        yield "teacache.profile", Path(config.teacache.profile)


def _paths_in(value: object, name: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, Settings):
        for field in type(value).model_fields:
            yield from _paths_in(getattr(value, field), f"{name}.{field}" if name else field)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _paths_in(one, f"{name}.{number}")
