"""Every setting of a run as a field of a form: what it is called, what it is for, how it is edited."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic_core import PydanticUndefined

from dittocache.config import RunConfig, setting_fields
from dittocache.errors import ConfigError

Editor = Literal["switch", "choice", "text", "path", "yaml"]

GROUPS = {
    "": ("Run", "Its name, and where it is written."),
    "model": ("Model", "The checkpoint that is trained and sampled."),
    "data": ("Data", "The samples, and to what size they are brought."),
    "cache": ("Cache", "What the encoders make is stored once and read in every epoch."),
    "train": ("Training", "The LoRA, the optimizer, how long, how weights are held."),
    "generate": ("Pictures", "How pictures are made with the LoRA."),
    "teacache": ("Step cache", "Skips denoising steps that change little; off unless one of these is set."),
    "reference_kv": ("Reference cache", "Keeps what reference pictures contribute; off unless this is set."),
    "calibrate": ("Calibration", "Measures the step cache's signal on this model."),
    "tune": ("Tuning", "Finds the fastest settings that keep a quality."),
}
"""Section -> its title and what it is for, in the order of the form."""

FIRST = (
    "name",
    "model.path",
    "data.path",
    "data.resolution",
    "data.caption_dropout",
    "train.steps",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "train.optimizer",
    "train.lr_schedule",
    "train.rank",
    "train.alpha",
    "train.gradient_checkpointing",
    "train.base_quantization",
    "train.offload",
    "train.validate_every",
    "train.checkpoint_every",
)
"""What most users look at: these come first in their groups, the others after them in the order of the models."""


BLANKS_COUNT = ("data.caption_prefix", "generate.negative_prompt")
"""Texts whose blanks at either end mean something."""


@dataclass(frozen=True)
class FormField:
    """One setting.

    Attributes:
        name: dotted.
        group: its section; empty for those of the run itself.
        help: what it is for.
        editor: how it is edited; `yaml` for lists and mappings, as YAML in one line.
        choices: of a choice.
        default: as it would be typed; empty where there is none.
        required: whether a run needs it.
    """

    name: str
    group: str
    help: str
    editor: Editor
    choices: tuple[str, ...] = ()
    default: str = ""
    required: bool = False

    @property
    def title(self) -> str:
        """Its name without the section's."""
        return self.name.rpartition(".")[2]

    @property
    def is_first(self) -> bool:
        """Whether most users look at it."""
        return self.name in FIRST

    def matches(self, words: str) -> bool:
        """Whether name, help or choices hold all of these words."""
        text = " ".join((self.name, self.name.replace("_", " "), self.help, *self.choices)).casefold()
        return all(word in text for word in words.casefold().split())


@cache
def form_fields() -> tuple[FormField, ...]:
    """All settings, group after group."""
    fields = [_field(name, field) for name, field in setting_fields(RunConfig)]
    order = list(GROUPS)
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    return tuple(sorted(fields, key=lambda one: (order.index(one.group), ranks.get(one.name, len(ranks)))))


def shown_value(value: Any) -> str:
    """A setting's value as it would be typed."""
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, int | float):
        return str(value)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).strip() if plain else ""


def typed_value(field: FormField, text: str) -> Any:
    """The value that typed text stands for, None where it is empty; raises ConfigError for text that is no YAML.

    Numbers and names stay text, which the setting's own type reads.
    """
    if not text.strip():
        return None
    if field.name in BLANKS_COUNT:
        return text
    text = text.strip()
    if field.editor != "yaml":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{field.name}: {text!r} is no YAML ({str(error).splitlines()[0]})") from error
    return str(value) if isinstance(value, Path) else value


def problems_by_field(problems: Sequence[str]) -> dict[str, list[str]]:
    """What is said of each setting: problems begin with its dotted name."""
    found: dict[str, list[str]] = {}
    names = sorted((field.name for field in form_fields()), key=len, reverse=True)
    for problem in problems:
        name = next((name for name in names if problem.startswith((f"{name}:", f"{name} ", f"{name}."))), "")
        said = problem.removeprefix(name).lstrip(": ") if name else problem
        found.setdefault(name, []).append(said)
    return found


def _field(name: str, field: Any) -> FormField:
    editor, choices = _editor(field.annotation)
    default = field.default if field.default_factory is None else field.default_factory()
    group = name.rpartition(".")[0]
    help = " ".join((field.description or "").replace("`", "").split())
    return FormField(name, group, help, editor, choices, shown_value(default), field.is_required())


def _editor(annotation: Any) -> tuple[Editor, tuple[str, ...]]:
    kinds = [kind for kind in _options(annotation) if kind is not type(None)]
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
        return "choice", tuple(str(one) for one in typing.get_args(kinds[0]))
    if kinds == [bool]:
        return "switch", ()
    if any(typing.get_origin(kind) in (list, dict, tuple) for kind in kinds):
        return "yaml", ()
    return ("path", ()) if Path in kinds else ("text", ())


def _options(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else (annotation,)
