"""What the commands share: their settings, how they start a job, how they say where the result is."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic_core import PydanticUndefined
from rich.console import Console

from dittocache.config import RunConfig, load_config, parse_overrides, setting_fields
from dittocache.errors import ConfigError
from dittocache.jobs.terminal import TerminalListener
from dittocache.jobs.workflow import run_workflow

ConfigFile = Annotated[Path | None, Parameter(name=["--config", "-c"], show_default=False)]
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, negative="")]
Flag = Annotated[bool, Parameter(negative="")]


def settings_help() -> str:
    """Every setting with its default, as a list under a command's help."""
    rows = []
    for name, field in setting_fields():
        default = "" if field.is_required() or field.default in (None, PydanticUndefined) else f" [{field.default}]"
        rows.append(f"- --{name}: {field.description}{default}")
    return "Settings, in the YAML file or on the command line:\n\n" + "\n".join(rows)


def load_settings(config: Path | None, settings: Sequence[str]) -> RunConfig:
    """The run's settings; raises ConfigError."""
    overrides = parse_overrides(settings)
    if config is None:
        near = difflib.get_close_matches("config", overrides, n=1)
        meant = f"; did you mean --config where you wrote --{near[0]}?" if near else ""
        raise ConfigError(f"--config FILE is missing: give the run's YAML file{meant}")
    return load_config(config, overrides)


def start_job(config: RunConfig, stages: Sequence[str]) -> Path:
    """Run the stages in the terminal and return the run's folder; raises StageFailed or WorkflowStopped."""
    typed = shlex.join(["dittocache", *sys.argv[1:]])
    with TerminalListener() as listener:
        return run_workflow(config, stages, listener, typed=typed)


def say(text: object) -> None:
    """Print for a person or a pipe: as it is, without wrapping."""
    Console(highlight=False, markup=False, soft_wrap=True).print(str(text))
