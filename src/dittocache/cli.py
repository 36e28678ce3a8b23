"""The command line: `dittocache COMMAND`. It reads words, calls the job, prints what went wrong in plain words."""

from __future__ import annotations

import difflib
import json as json_text
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from pydantic_core import PydanticUndefined
from rich.console import Console

from dittocache import __version__
from dittocache.config import RunConfig, load_config, parse_overrides, setting_fields
from dittocache.errors import ConfigError, DataError, DittocacheError, ModelError
from dittocache.jobs.run_folder import LORA_NAME, REPORT_NAME, SAMPLES_NAME
from dittocache.jobs.stages import CACHE, DEMO, TRAIN
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import StageFailed, WorkflowStopped, run_workflow

EXIT_CONFIG = 2
EXIT_STOPPED = 130

ConfigFile = Annotated[Path | None, Parameter(name=["--config", "-c"], show_default=False)]
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, negative="")]
Flag = Annotated[bool, Parameter(negative="")]


def _settings_help() -> str:
    """Every setting with its default, as a list under a command's help."""
    rows = []
    for name, field in setting_fields():
        default = "" if field.is_required() or field.default in (None, PydanticUndefined) else f" [{field.default}]"
        rows.append(f"- --{name}: {field.description}{default}")
    return "Settings, in the YAML file or on the command line:\n\n" + "\n".join(rows)


app = App(
    name="dittocache",
    version=__version__,
    help="Cache everything worth caching around Qwen-Image-family diffusion transformers: embeddings while "
    "training, denoising steps and reference pictures while sampling. New here? Start with `dittocache demo`.",
    help_epilogue="`dittocache COMMAND --help` explains a command. Exit codes: 0 done, 2 a setting, the data set or "
    "the model is at fault, 130 stopped with Ctrl-C, 1 anything else.",
)


@app.command
def demo(*settings: Overrides) -> None:
    """See it all work on this machine: a small bundled model learns an edit from 40 pictures; a report shows it.

    Needs no GPU, no network and a few minutes. Run it twice: the second time, nothing is encoded again.

    Parameters
    ----------
    settings
        Any setting, such as `--train.steps 100`; `dittocache train --help` lists them.
    """
    from dittocache.jobs.demo_job import demo_config

    run_dir = _run(demo_config(parse_overrides(settings)), DEMO)
    Console(highlight=False).print(f"report: {run_dir / REPORT_NAME}", soft_wrap=True)


@app.command(help_epilogue=_settings_help())
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

    settings_of_run = _load(config, settings)
    found = RunInputs(settings_of_run, settings_of_run.run_dir).plan()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(json_text.dumps(found.as_dict(), indent=2) if json else found.describe())


@app.command(help_epilogue=_settings_help())
def cache(*settings: Overrides, config: ConfigFile = None) -> None:
    """Encode what is missing in the embedding cache, after checking everything. Stop and go on at any time.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    settings
        Any setting, such as `--cache.batch_size 8`.
    """
    _run(_load(config, settings), CACHE)


@app.command(help_epilogue=_settings_help())
def train(*settings: Overrides, config: ConfigFile = None) -> None:
    """Fine-tune a LoRA: check everything, encode what is missing, train. The one command a training needs.

    An interrupted training goes on where it stopped. Ctrl-C finishes the step and saves; twice ends it at once.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    settings
        Any setting, such as `--train.steps 2000`.
    """
    chosen = _load(config, settings)
    stages = TRAIN if chosen.cache.use_cache else ("validate", "train")
    _done(_run(chosen, stages) / LORA_NAME)


@app.command(help_epilogue=_settings_help())
def generate(*settings: Overrides, config: ConfigFile = None) -> None:
    """Make pictures: with the run's LoRA where there is one, and with each cache beside plain sampling.

    Without a prompt, the held-out pictures of the run are edited.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    settings
        Any setting, such as `--generate.prompt 'make the wall green' --generate.image '[room.png]'`.
    """
    _done(_run(_load(config, settings), ("generate",)) / SAMPLES_NAME)


@app.command(help_epilogue=_settings_help())
def report(*settings: Overrides, config: ConfigFile = None) -> None:
    """Write the run's report: one HTML page with what was cached, the loss curve, pictures, times and quality.

    Parameters
    ----------
    config
        The run's settings, a YAML file such as configs/qwen-image-edit-plus.yaml. Required.
    settings
        Any setting, such as `--name my-edit`.
    """
    _done(_run(_load(config, settings), ("report",)) / REPORT_NAME)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are printed without a traceback."""
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        app(list(arguments), exit_on_error=True, result_action="return_value")
    except SystemExit as ended:  # cyclopts has explained a misspelt command or option
        return ended.code if isinstance(ended.code, int) else EXIT_CONFIG
    except WorkflowStopped as stopped:
        errors.print(str(stopped))
        return EXIT_STOPPED
    except StageFailed as failed:
        errors.print(str(failed), style="red")
        return EXIT_CONFIG if failed.returncode == EXIT_CONFIG else 1
    except DittocacheError as error:
        errors.print(str(error), style="red")
        return EXIT_CONFIG if isinstance(error, ConfigError | DataError | ModelError) else 1
    except KeyboardInterrupt:
        errors.print("stopped")
        return EXIT_STOPPED
    return 0


def _load(config: Path | None, settings: Sequence[str]) -> RunConfig:
    """The run's settings; raises ConfigError."""
    overrides = parse_overrides(settings)
    if config is None:
        near = difflib.get_close_matches("config", overrides, n=1)
        meant = f"; did you mean --config where you wrote --{near[0]}?" if near else ""
        raise ConfigError(f"--config FILE is missing: give the run's YAML file{meant}")
    return load_config(config, overrides)


def _run(config: RunConfig, stages: Sequence[str]) -> Path:
    typed = shlex.join(["dittocache", *sys.argv[1:]])
    with TerminalListener() as listener:
        return run_workflow(config, stages, listener, typed=typed)


def _done(path: Path) -> None:
    Console(highlight=False, markup=False, soft_wrap=True).print(str(path))
