"""Settings to begin with: the ready YAML files, what suits the chosen data and model, a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, load_config, save_config
from dittocache.errors import ConfigError
from dittocache.studio.draft import given_settings
from dittocache.studio.state import Studio
from dittocache.studio.training import refuse_outside

OWN = ("name", "output_dir", "held_out", "data.path", "data.sets", "data.control_path", "cache.cache_dir")
"""What a preset leaves as the draft has it: where things are."""

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Preset:
    """A ready YAML file.

    Attributes:
        path: the file.
        title: its first line of comment: which model, which GPU.
        notes: its other lines of comment that are words and no commands, such as the memory it takes.
    """

    path: Path
    title: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def presets() -> list[Preset]:
    """The ready files that come with the package, by name."""
    shipped, checkout = _PACKAGE / "presets", _PACKAGE.parents[1] / "configs"
    folder = shipped if shipped.is_dir() else checkout
    return [_preset(file) for file in sorted(folder.glob("*.yaml")) if file.stem != "demo"]


def preset_settings(preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """The draft that a preset makes of what was given.

    Places stay as they are; the model too where the preset is for its family or none was named.
    """
    settings = given_settings(load_config(preset.path))
    kept = [name for name in OWN if name in given]
    same_family = given.get("model.family") in (None, settings.get("model.family"))
    if "model.path" in given and same_family:
        kept.append("model.path")
    places = {name: None for name in OWN if name in settings}
    return {**settings, **places, **{name: given[name] for name in kept}}


def is_bare(given: Mapping[str, Any]) -> bool:
    """Whether a draft says nothing of how to train, so that a quick start may choose it."""
    return not any(name.startswith("train.") or name == "data.resolution" for name in given)


def quick_start(studio: Studio) -> list[str]:
    """Put into the draft what suits its data and its model, and return in words what was chosen.

    Raises ConfigError listing what is missing or wrong, paths outside the allowed folders among it. Needs torch: run it
    on the worker.
    """
    from dittocache.jobs.quick_start import quick_config

    refuse_outside(studio, studio.config())
    given = studio.draft.given
    told: list[str] = []
    overrides = {name: given[name] for name in (*OWN, "model.family", "model.device") if name in given}
    overrides.pop("data.path", None)
    config = quick_config(given.get("data.path"), given.get("model.path"), overrides, told.append)
    studio.draft.replace(given_settings(config))
    return [one.partition("; --")[0] for one in told]  # how to say otherwise on the command line


def load_file(studio: Studio, path: Path) -> RunConfig:
    """Put the settings of a YAML or TOML file into the draft; a ConfigError lists every problem and changes nothing."""
    config = load_config(studio.path(path))
    studio.draft.replace(given_settings(config))
    return config


def save_file(studio: Studio, path: Path) -> Path:
    """Write the draft's settings to a YAML file, defaults included; raises ConfigError, AccessError."""
    file = studio.path(path)
    if file.suffix.lower() not in (".yaml", ".yml"):
        file = file.with_name(file.name + ".yaml")
    try:
        save_config(studio.config(), file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror or error}); choose another place") from error
    return file


def _preset(file: Path) -> Preset:
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    words = [line for line in lines[1:] if not line.startswith(("dittocache ", "Any setting"))]
    return Preset(file, lines[0] if lines else file.stem, tuple(words))
