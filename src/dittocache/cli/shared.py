"""What the commands share: their settings, how they start a job, how they say where the result is."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic_core import PydanticUndefined
from rich.console import Console

from dittocache.config import RunConfig, load_config, parse_overrides, setting_fields
from dittocache.errors import ConfigError
from dittocache.jobs.run_folder import CONFIG_NAME
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import run_workflow

ConfigFile = Annotated[Path | None, Parameter(name=["--config", "-c"], show_default=False)]
RunFile = Annotated[
    ConfigFile,
    Parameter(
        help="The run's settings, a YAML file such as configs/qwen-image-edit-plus-24gb.yaml. Required, unless data "
        "and model are given, or --name names a run that is there."
    ),
]
DataPath = Annotated[
    str | None,
    Parameter(
        show_default=False,
        help="Folder of pictures and captions, or a table of them; with a config, in place of its data.path.",
    ),
]
ModelPath = Annotated[
    str | None,
    Parameter(
        show_default=False,
        help="Folder of a checkpoint, its id on the hub, or `bundled`; with a config, in place of its model.path.",
    ),
]
CacheOption = Annotated[str | None, Parameter(show_default=False)]
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, negative="")]
Flag = Annotated[bool, Parameter(negative="")]


def settings_help() -> str:
    """Every setting with its default, as a list under a command's help."""
    rows = []
    for name, field in setting_fields():
        default = "" if field.is_required() or field.default in (None, PydanticUndefined) else f" [{field.default}]"
        rows.append(f"- --{name}: {field.description}{default}")
    return "Settings, in the YAML file or on the command line:\n\n" + "\n".join(rows)


def load_settings(
    config: Path | None,
    settings: Sequence[str],
    data: str | None = None,
    model: str | None = None,
    named_cache: str | None = None,
    from_prompt: bool = False,
) -> RunConfig:
    """The settings of a YAML file, of a run by its `--name`, or chosen for `data` and `model`; raises ConfigError.

    `named_cache` is the step cache that the environment names. With `from_prompt` a model and `generate.prompt` are
    enough.
    """
    overrides = parse_overrides(settings)
    data, model = _only_one("data", data, overrides), _only_one("model", model, overrides)
    if config is not None:
        named = {"data.path": data, "model.path": model}
        given = overrides | {name: value for name, value in named.items() if value is not None}
        return load_config(config, given, named_cache)
    if data is not None or model is not None:
        from dittocache.jobs.quick_start import picture_config, quick_config

        if from_prompt and data is None and model is not None and overrides.get("generate.prompt") is not None:
            return picture_config(model, overrides, named_cache)
        return quick_config(data, model, overrides, note, named_cache)
    if overrides.get("name"):
        return load_config(_config_of_run(overrides), overrides, named_cache)
    near = difflib.get_close_matches("config", overrides, n=1)
    meant = f"; did you mean --config where you wrote --{near[0]}?" if near else ""
    raise ConfigError(
        "--config FILE is missing: give the run's YAML file, --data FOLDER and --model PATH without any, or the "
        f"--name of a run that is there{meant}"
    )


def note(text: str) -> None:
    """Tell a person something that is no result: beside the output, which a pipe may read."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)


def follow_up(command: str, config: RunConfig) -> str:
    """The command line that does something more with a run."""
    folder = config.output_dir
    place = [] if folder == RunConfig.model_fields["output_dir"].default else ["--output_dir", str(folder)]
    return shlex.join(["dittocache", command, "--name", config.name, *place])


def _only_one(option: str, value: str | None, overrides: dict[str, Any]) -> str | None:
    """What `--data` or `--data.path` says, taken out of the overrides; raises ConfigError where both say something."""
    setting = f"{option}.path"
    if value is not None and overrides.get(setting, value) != value:
        raise ConfigError(
            f"--{option} is {value!r} but --{setting} is {overrides[setting]!r}; they mean the same: keep one"
        )
    said = overrides.pop(setting, None)
    return value if value is not None else said


def _config_of_run(overrides: Mapping[str, Any]) -> Path:
    """The settings that the run of this name was started with; raises ConfigError where there is none."""
    runs = Path(overrides.get("output_dir", RunConfig.model_fields["output_dir"].default))
    path = runs / str(overrides["name"]) / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(
            f"there is no run {path.parent}; give --config FILE, or --data FOLDER and --model PATH, to begin one"
        )
    return path


def start_job(config: RunConfig, stages: Sequence[str]) -> Path:
    """Run the stages in the terminal and return the run's folder; raises StageFailed or WorkflowStopped."""
    typed = shlex.join(["dittocache", *sys.argv[1:]])
    with TerminalListener() as listener:
        return run_workflow(config, stages, listener, typed=typed)


def progress_of(json: bool) -> TerminalListener:
    """Shows how far a command is; beside the output where that is for programs."""
    return TerminalListener(Console(stderr=True, highlight=False) if json else None)


def say(text: object) -> None:
    """Print for a person or a pipe: as it is, without wrapping."""
    Console(highlight=False, markup=False, soft_wrap=True).print(str(text))
