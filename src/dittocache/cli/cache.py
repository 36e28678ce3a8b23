"""`dittocache cache ...`: fill the embedding cache, look into it, keep it in order."""

from __future__ import annotations

import json as json_text

from cyclopts import App

from dittocache.cli.shared import ConfigFile, Flag, Overrides, load_settings, say, settings_help, start_job
from dittocache.jobs.stages import CACHE

cache_app = App(
    name="cache",
    help="Encode what is missing in the embedding cache; `dittocache cache COMMAND` looks after it.",
    help_epilogue=settings_help(),
)


@cache_app.default
def cache(*settings: Overrides, config: ConfigFile = None) -> None:
    """Encode what is missing in the embedding cache, after checking everything. Stop and go on at any time.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    settings
        Any setting, such as `--cache.batch_size 8`.
    """
    start_job(load_settings(config, settings), CACHE)


cache_app.command(cache, name="run", help_epilogue=settings_help())


@cache_app.command(help_epilogue=settings_help())
def plan(*settings: Overrides, config: ConfigFile = None, json: Flag = False) -> None:
    """Say what is cached, what would be encoded, and why. Loads no model and changes nothing.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    json
        Print JSON for programs instead of words.
    settings
        Any setting, such as `--data.path my-edits`.
    """
    from dittocache.jobs.inputs import RunInputs

    settings_of_run = load_settings(config, settings)
    found = RunInputs(settings_of_run, settings_of_run.run_dir).plan()
    say(json_text.dumps(found.as_dict(), indent=2) if json else found.describe())
