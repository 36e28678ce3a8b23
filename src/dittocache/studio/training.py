"""Puts the draft's training in line, lets one that ended go on, and tells what waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dittocache.config import BUNDLED, RunConfig, load_config
from dittocache.data.listed.kinds import kind_of
from dittocache.errors import AccessError, ConfigError, StageError
from dittocache.jobs.queue.folder import Queue, QueueEntry
from dittocache.jobs.queue.runner import ensure_runner
from dittocache.jobs.run_folder import CONFIG_NAME, EVENTS_NAME, is_locked
from dittocache.jobs.stages import CACHE, TRAIN
from dittocache.settings import Settings
from dittocache.studio.state import Studio


def start_training(studio: Studio) -> Path:
    """Put the workflow of the draft at the end of the line, which begins at once where its device is free.

    Returns the run's folder, which may not be there yet. Raises ConfigError listing every problem with the settings,
    StageError where the run of that folder is at work or waits already. Needs torch: run it on the worker.
    """
    return line_up(*_with_training(checked_config(studio)))


def start_caching(studio: Studio) -> Path:
    """Start only what comes before the training: check and encode what is missing; raises as `start_training`."""
    return line_up(checked_config(studio), CACHE)


def resume_run(studio: Studio, run_dir: Path) -> Path:
    """Let a run go on where it stopped, with the settings in its folder; raises as `start_training`."""
    config = load_config(studio.path(run_dir) / CONFIG_NAME)
    problems = outside_problems(studio, config)
    if problems:
        raise ConfigError(f"{run_dir} cannot go on in this Studio", problems)
    return line_up(*_with_training(config))


def line_up(config: RunConfig, stages: Sequence[str]) -> Path:
    """Put a run at the end of the line and return its folder; raises StageError as `start_training`. Needs torch."""
    queue = Queue()
    run_dir = config.run_dir.absolute()
    at_work = is_locked(run_dir)
    if at_work or any(one.job.run_dir == run_dir for one in queue.entries() if one.state in ("waiting", "running")):
        state = "is at work" if at_work else "waits in line"
        raise StageError(f"the run {run_dir.name} {state} already; wait for its end, or give this one another name")
    added = queue.add(config, stages)
    ensure_runner(queue)
    return added.run_dir


def waiting_jobs() -> list[QueueEntry]:
    """What waits in line on this machine, whoever put it there, and what could not be started, in order."""
    return [one for one in Queue().entries() if one.state == "waiting" or _never_began(one)]


def leave_line(number: int) -> None:
    """Take a job out of the line; raises StageError where it runs by now."""
    Queue().remove(number)


def serve_line() -> None:
    """Have what waits started, also what waited when this machine was last switched off."""
    ensure_runner(Queue())


def checked_config(studio: Studio) -> RunConfig:
    """The draft's settings; raises ConfigError listing every problem, paths outside the allowed folders among them."""
    config = studio.config()
    refuse_outside(studio, config)
    return config


def refuse_outside(studio: Studio, config: RunConfig) -> None:
    """Raise ConfigError listing the paths of settings that are outside the allowed folders, if any are."""
    problems = outside_problems(studio, config)
    if problems:
        raise ConfigError(f"{len(problems)} path(s) are outside the Studio's folders", problems)


def outside_problems(studio: Studio, config: RunConfig) -> list[str]:
    """Each path of the settings that the Studio may not read or write, with its setting's name."""
    problems = []
    for name, path in _places(config):
        try:
            studio.path(path)
        except AccessError as error:
            problems.append(f"{name}: {error}")
    return problems


def _with_training(config: RunConfig) -> tuple[RunConfig, Sequence[str]]:
    return config, TRAIN if config.cache.use_cache else ("validate", "train")


def _never_began(entry: QueueEntry) -> bool:
    return entry.state == "failed" and not (entry.job.run_dir / EVENTS_NAME).exists()


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
