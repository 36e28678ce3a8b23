"""`dittocache cache verify | pack | gc | clear | inspect`: a store that is looked after, whole, whoever filled it."""

from __future__ import annotations

import json as json_text
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from cyclopts import App, Parameter
from rich.prompt import Confirm

from dittocache.cli.shared import ConfigFile, Flag, Overrides, load_settings, progress_of, say
from dittocache.errors import ConfigError
from dittocache.events import EventLog
from dittocache.jobs.terminal import TerminalListener

CacheDir = Annotated[str | None, Parameter(show_default=False)]


class Findings(Protocol):
    """What every command of this page ends with."""

    def describe(self) -> str:
        """In words."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        ...


def verify(*settings: Overrides, config: ConfigFile = None, cache_dir: CacheDir = None, json: Flag = False) -> None:
    """Read every record and prove it by its checksum. Bad ones go to quarantine; the next caching makes them anew.

    Ends with exit code 1 when something was bad.

    Parameters
    ----------
    config
        A run that uses the cache.
    cache_dir
        The cache itself, a folder or URL, in place of a run.
    json
        Print JSON for programs instead of words.
    settings
        With a run: any setting, such as `--cache.cache_dir other`.
    """
    from dittocache.embeddings.store.verification import verify_store

    store = _store(config, cache_dir, settings)
    with progress_of(json) as listener:
        found = verify_store(store, log=_log("verify", listener))
    _say(found, json)
    if found.bad or found.damaged_packs:
        sys.exit(1)


def pack(*settings: Overrides, config: ConfigFile = None, cache_dir: CacheDir = None, json: Flag = False) -> None:
    """Gather the records in files of 256 MB: fewer files, faster to read and to copy. Runs may go on meanwhile.

    Parameters
    ----------
    config
        A run that uses the cache.
    cache_dir
        The cache itself, in place of a run.
    json
        Print JSON for programs instead of words.
    settings
        With a run: any setting, such as `--cache.cache_dir other`.
    """
    from dittocache.embeddings.store.packing import pack_records

    store = _store(config, cache_dir, settings)
    with progress_of(json) as listener:
        done = pack_records(store, log=_log("pack", listener))
    _say(done, json)


def gc(
    *settings: Overrides,
    config: ConfigFile = None,
    cache_dir: CacheDir = None,
    min_age_hours: float = 1.0,
    yes: Flag = False,
    json: Flag = False,
) -> None:
    """Remove the records that no run needs any more. Shows what and how much first, and asks.

    Parameters
    ----------
    config
        A run that uses the cache.
    cache_dir
        The cache itself, in place of a run.
    min_age_hours
        Younger records stay.
    yes
        Remove without asking; without it and without a terminal to ask in, nothing is removed.
    json
        Print JSON for programs instead of words; removes only with --yes.
    settings
        With a run: any setting, such as `--cache.cache_dir other`.
    """
    from dittocache.embeddings.store.gc import collect, plan_gc

    if min_age_hours < 0:
        raise ConfigError(f"--min-age-hours: found {min_age_hours}; expected 0 or more")
    store = _store(config, cache_dir, settings)
    found = plan_gc(store, min_age_seconds=min_age_hours * 3600)
    if not (json and yes):
        _say(found, json)
    if not (found.records or found.temporaries or found.quarantine or found.dead_roots):
        return
    if _agreed(yes, json, "Remove them?"):
        with progress_of(json) as listener:
            done = collect(store, found, log=_log("gc", listener))
        _say(done, json)


def clear(
    *settings: Overrides,
    config: ConfigFile = None,
    cache_dir: CacheDir = None,
    yes: Flag = False,
    json: Flag = False,
) -> None:
    """Remove the whole cache, whoever uses it. Shows what and how much first, and asks; foreign files stay.

    Parameters
    ----------
    config
        A run that uses the cache.
    cache_dir
        The cache itself, in place of a run.
    yes
        Remove without asking; without it and without a terminal to ask in, nothing is removed.
    json
        Print JSON for programs instead of words; removes only with --yes.
    settings
        With a run: any setting, such as `--cache.cache_dir other`.
    """
    from dittocache.embeddings.store import clearing

    store = _store(config, cache_dir, settings)
    found = clearing.plan_clear(store)
    if not (json and yes):
        _say(found, json)
    if found.files and _agreed(yes, json, "Remove all of it?"):
        done = clearing.clear(store)
        say(json_text.dumps(done.as_dict(), indent=2) if json else "removed")


def inspect(
    *words: Overrides,
    config: ConfigFile = None,
    cache_dir: CacheDir = None,
    json: Flag = False,
) -> None:
    """Say what one record is and what it was made from; without a key, what the cache holds in numbers.

    Parameters
    ----------
    words
        A record's key (32 hex digits) or file; then, with a run, any setting, such as `--cache.cache_dir other`.
    config
        A run that uses the cache.
    cache_dir
        The cache itself, in place of a run.
    json
        Print JSON for programs instead of words.
    """
    from dittocache.embeddings.store import inspection

    record = [] if not words or words[0].startswith("--") else [words[0]]
    store = _store(config, cache_dir, words[len(record) :])
    if record:
        say(json_text.dumps(inspection.inspect(store, record[0]), indent=2))
        return
    with progress_of(json) as listener:
        found = inspection.statistics(store, log=_log("inspect", listener))
    _say(found, json)


def add_to(app: App) -> None:
    """Make these commands commands of `app`."""
    for command in (verify, pack, gc, clear, inspect):
        app.command(command)


def _store(config: Path | None, cache_dir: str | None, settings: Sequence[str]) -> Any:
    """The store of a run or at a place; raises ConfigError when neither or both are given, or nothing is there."""
    from dittocache.embeddings.store.location import location
    from dittocache.embeddings.store.store import Store

    if (config is None) == (cache_dir is None):
        raise ConfigError("give either --cache-dir DIR, the cache, or --config FILE, a run that uses it")
    place = location(cache_dir) if cache_dir is not None else load_settings(config, settings).cache.cache_dir
    if cache_dir is not None and settings:
        raise ConfigError(f"settings such as {settings[0]} belong to --config FILE; --cache-dir stands alone")
    if isinstance(place, Path) and not place.is_dir():
        raise ConfigError(f"there is no cache {place}; `dittocache cache --config FILE` makes one")
    return Store(place)


def _log(stage: str, listener: TerminalListener) -> EventLog:
    """Progress for the terminal alone: a store belongs to no single run's events."""
    return EventLog(Path(os.devnull), stage, listener)


def _say(found: Findings, json: bool) -> None:
    say(json_text.dumps(found.as_dict(), indent=2) if json else found.describe())


def _agreed(yes: bool, json: bool, question: str) -> bool:
    if yes or json:
        return yes
    if sys.stdin.isatty():
        return Confirm.ask(question, default=False)
    say("nothing was removed: add --yes to remove it")
    return False
