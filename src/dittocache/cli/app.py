"""The command line: `dittocache COMMAND`. It reads words, calls the job, prints what went wrong in plain words."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App
from rich.console import Console

from dittocache import __version__
from dittocache.cli.cache import cache_app, plan
from dittocache.cli.quality import add_quality_commands
from dittocache.cli.queue import queue_app
from dittocache.cli.shared import (
    CacheOption,
    DataPath,
    ModelPath,
    Overrides,
    RunFile,
    follow_up,
    load_settings,
    note,
    say,
    settings_help,
    start_job,
)
from dittocache.cli.studio import studio
from dittocache.config import parse_overrides
from dittocache.errors import ConfigError, DataError, DittocacheError, ModelError
from dittocache.jobs.run_folder import LORA_NAME, REPORT_NAME, SAMPLES_NAME
from dittocache.jobs.stages import DEMO, TRAIN
from dittocache.jobs.workflow import StageFailed, WorkflowStopped
from dittocache.sampling.cache_keys import ADAPTER_VARIABLE

EXIT_CONFIG = 2
EXIT_STOPPED = 130

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

    run_dir = start_job(demo_config(parse_overrides(settings)), DEMO)
    say(f"report: {run_dir / REPORT_NAME}")


app.command(cache_app)
app.command(queue_app)
app.command(plan, help_epilogue=settings_help())
add_quality_commands(app)
app.command(studio)


@app.command(help_epilogue=settings_help())
def train(*settings: Overrides, config: RunFile = None, data: DataPath = None, model: ModelPath = None) -> None:
    """Fine-tune a LoRA: check everything, encode what is missing, train. The one command a training needs.

    `dittocache train --data FOLDER --model PATH` needs no YAML: it chooses the settings, says which, and keeps them in
    runs/FOLDER/config.yaml. Steps: each sample about 100 times, at least 500 and at most 4000 in all.
    An interrupted training goes on where it stopped. Ctrl-C finishes the step and saves; twice ends it at once.

    Parameters
    ----------
    settings
        Any setting, such as `--train.steps 2000`.
    """
    chosen = load_settings(config, settings, data, model)
    stages = TRAIN if chosen.cache.use_cache else ("validate", "train")
    lora = start_job(chosen, stages) / LORA_NAME
    if lora.is_dir():  # a launcher's other processes have none
        say(lora)
        note(
            f"to see what it learnt: {follow_up('generate', chosen)}; the loss and the pictures: "
            f"{follow_up('report', chosen)}"
        )


@app.command(help_epilogue=settings_help())
def generate(
    *settings: Overrides,
    config: RunFile = None,
    data: DataPath = None,
    model: ModelPath = None,
    model_class_name: CacheOption = None,
    cache_adapter: CacheOption = None,
    cache_config: CacheOption = None,
) -> None:
    """Make pictures: with the run's LoRA where there is one, and with each cache beside plain sampling.

    Without a prompt, the held-out pictures of the run are edited. With one, --model PATH is all that is needed:
    `dittocache generate --model PATH --generate.prompt 'make the wall green' --generate.image room.png`.

    Parameters
    ----------
    model_class_name
        Pipeline class of the model, such as QwenImagePipeline; read from the checkpoint when left out.
    cache_adapter
        `tea_cache` or `none`. Where neither this nor the config names a step cache, DIFFUSION_CACHE_ADAPTER in the
        environment does.
    cache_config
        Settings of the step cache, in place of the config's: '{"rel_l1_thresh": 0.2}'. They turn it on.
    settings
        Any setting, such as `--generate.prompt 'make the wall green' --generate.image '[room.png]'`.
    """
    named = {
        "model_class_name": model_class_name,
        "cache_adapter": cache_adapter,
        "cache_config": cache_config,
    }
    words = [*settings, *(f"--{name}={value}" for name, value in named.items() if value is not None)]
    chosen = load_settings(config, words, data, model, os.environ.get(ADAPTER_VARIABLE), from_prompt=True)
    say(start_job(chosen, ("generate",)) / SAMPLES_NAME)


@app.command(help_epilogue=settings_help())
def report(*settings: Overrides, config: RunFile = None, data: DataPath = None, model: ModelPath = None) -> None:
    """Write the run's report: one HTML page with what was cached, the loss curve, pictures, times and quality.

    Parameters
    ----------
    settings
        Any setting, such as `--name my-edit`.
    """
    say(start_job(load_settings(config, settings, data, model), ("report",)) / REPORT_NAME)


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
