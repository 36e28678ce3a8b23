"""`dittocache cache ...`: fill the embedding cache, see what is in it, bring in and take out caches of other tools."""

from __future__ import annotations

import difflib
import json as json_text
from pathlib import Path
from typing import Literal

from cyclopts import App

from dittocache.cli import cache_care
from dittocache.cli.shared import (
    ConfigFile,
    DataPath,
    Flag,
    ModelPath,
    Overrides,
    RunFile,
    load_settings,
    progress_of,
    say,
    settings_help,
    start_job,
)
from dittocache.errors import ConfigError
from dittocache.jobs.stages import CACHE

cache_app = App(
    name="cache",
    help="Encode what is missing in the embedding cache; `dittocache cache COMMAND` looks after it.",
    help_epilogue=settings_help(),
)


@cache_app.default
def cache(*settings: Overrides, config: RunFile = None, data: DataPath = None, model: ModelPath = None) -> None:
    """Encode what is missing in the embedding cache, after checking everything. Stop and go on at any time.

    Parameters
    ----------
    settings
        Any setting, such as `--cache.text_batch_size 8`.
    """
    if settings and not settings[0].startswith("-"):
        commands = sorted(name for name in cache_app if not name.startswith("-"))
        near = difflib.get_close_matches(settings[0], commands, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"`dittocache cache` has no command {settings[0]!r}{meant}; it has: {', '.join(commands)}")
    start_job(load_settings(config, settings, data, model), CACHE)


cache_app.command(cache, name="run", help_epilogue=settings_help())


@cache_app.command(help_epilogue=settings_help())
def plan(
    *settings: Overrides,
    config: RunFile = None,
    data: DataPath = None,
    model: ModelPath = None,
    json: Flag = False,
) -> None:
    """Say what is cached, what would be encoded, and why. Loads no model and changes nothing.

    Parameters
    ----------
    json
        Print JSON for programs instead of words.
    settings
        Any setting, such as `--data.path my-edits`.
    """
    from dittocache.jobs.inputs import RunInputs

    settings_of_run = load_settings(config, settings, data, model)
    found = RunInputs(settings_of_run, settings_of_run.run_dir).plan()
    say(json_text.dumps(found.as_dict(), indent=2) if json else found.describe())


@cache_app.command(name="import")
def import_(
    tool: Literal["qflux", "musubi"],
    folder: Path,
    *settings: Overrides,
    config: ConfigFile = None,
    check: int = 0,
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Take over what qflux or musubi-tuner has cached, and say loudly what of it could not be verified.

    Parameters
    ----------
    tool
        Whose cache it is.
    folder
        Its cache folder: qflux's `cache_dir`, musubi-tuner's `cache_directory`.
    config
        The run that shall use it: data set, model, sizes. Required.
    check
        Encode so many samples with the run's own encoders and compare before anything is written.
    dry_run
        Only look.
    json
        Print JSON for programs instead of words.
    settings
        Any setting, such as `--data.path my-edits`.
    """
    from dittocache.jobs.cache_exchange import import_cache

    with progress_of(json) as listener:
        found = import_cache(load_settings(config, settings), tool, folder, listener, check=check, dry_run=dry_run)
    say(json_text.dumps(found.as_dict(), indent=2) if json else found.describe())


@cache_app.command
def export(
    folder: Path,
    *settings: Overrides,
    config: ConfigFile = None,
    format: Literal["pt", "safetensors"] = "pt",
    layout: Literal["qflux", "flat"] = "qflux",
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Write the run's cached tensors as files for other tools.

    Parameters
    ----------
    folder
        Where to write; an interrupted export goes on there.
    config
        The run whose cache it is. Required.
    format
        `pt` (torch.save) or `safetensors`.
    layout
        `qflux`: ARTIFACT/HASH and metadata/, as qflux reads it; `flat`: one file for each sample.
    dry_run
        Only say how much it would be.
    json
        Print JSON for programs instead of words.
    settings
        Any setting, such as `--name my-run`.
    """
    from dittocache.jobs.cache_exchange import export_cache

    with progress_of(json) as listener:
        done = export_cache(load_settings(config, settings), folder, listener, format, layout, dry_run=dry_run)
    say(json_text.dumps(done.as_dict(), indent=2) if json else done.describe())


cache_care.add_to(cache_app)
