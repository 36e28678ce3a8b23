"""`dittocache calibrate` and `dittocache tune`: fit the step cache to a model, and choose its settings."""

from __future__ import annotations

from cyclopts import App

from dittocache.cli.shared import (
    DataPath,
    ModelPath,
    Overrides,
    RunFile,
    load_settings,
    say,
    settings_help,
    start_job,
)
from dittocache.jobs.run_folder import PROFILE_NAME


def add_quality_commands(app: App) -> None:
    """Add the commands of this page to the command line."""
    app.command(calibrate, help_epilogue=settings_help())
    app.command(tune, help_epilogue=settings_help())


def calibrate(*settings: Overrides, config: RunFile = None, data: DataPath = None, model: ModelPath = None) -> None:
    """Fit TeaCache's polynomial to this model, its LoRA, sampler, steps and size, and say how good the fit is.

    Makes a few pictures of the run's prompts without a cache. The result is a profile that `--teacache.profile auto`
    finds.

    Parameters
    ----------
    settings
        Any setting, such as `--calibrate.degree 3`.
    """
    say(start_job(load_settings(config, settings, data, model), ("calibrate",)) / PROFILE_NAME)


def tune(
    *settings: Overrides,
    config: RunFile = None,
    data: DataPath = None,
    model: ModelPath = None,
    target: str | None = None,
) -> None:
    """Find the fastest setting that keeps to a picture quality, or the best one at a speed, on this model.

    Tries step caches of every kind and fewer plain steps on the run's prompts, and verifies the choice on others. The
    result is a profile that `--teacache.profile auto` finds. Ctrl-C keeps what was measured.

    Parameters
    ----------
    target
        `psnr>=35` (dB beside the picture without a cache), `ssim>=0.97`, `flip<=0.05` or `speedup>=2`; in quotes.
    settings
        Any setting, such as `--tune.samples 12`.
    """
    words = [*settings] if target is None else [*settings, f"--tune.target={target}"]
    say(start_job(load_settings(config, words, data, model), ("tune",)) / PROFILE_NAME)
