"""Settings of the `data` section."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dittocache.data.listed.kinds import kind_of
from dittocache.settings import Settings

SMALLEST_SIDE = 32
Frame = tuple[int, int]
ROLES = ("target", "controls", "prompt", "mask")


class SetSettings(Settings):
    """How the samples of one data set are found and brought to size."""

    path: Path | None
    """Folder with pictures and captions, `.csv` or `.jsonl` table, `.toml` list of sets, or Hugging Face data set."""

    control_path: Path | None = None
    """Folder of control pictures that lies elsewhere; targets and captions then lie in `path` itself."""

    resolution: int | list[int | tuple[int, int]] = 1024
    """Side in pixels of the square whose area pictures are resized to; the aspect ratio is kept. In a list, each sample
    is trained on once at each; `[width, height]` inside the list stands for the area of that frame."""

    buckets: bool = True
    """Whether each picture keeps its aspect ratio; `false` cuts every target to `resolution` by `resolution` pixels."""

    bucket_step: int | None = Field(default=None, ge=8)
    """The sides of resized pictures are multiples of this many pixels: a multiple of what the model needs (16 or 32),
    which it is when left out."""

    upscale: bool = True
    """Whether pictures smaller than `resolution` are enlarged; `false` leaves them their own size."""

    control_resolution: int | None = Field(default=None, ge=SMALLEST_SIDE)
    """Side in pixels of the square whose area control pictures are resized to; that of the target when left out."""

    resize_controls: bool = True
    """Whether control pictures are resized at all; `false` leaves them their own size."""

    caption_extension: str = ".txt"
    """Ending of the files that hold captions."""

    caption_prefix: str = ""
    """Words put in front of every caption, with `, ` between when they end in a letter or digit."""

    trigger_word: str | None = Field(default=None, min_length=1)
    """Word put in front of every caption that does not have it already, with `, ` between."""

    repeats: int = Field(default=1, ge=1)
    """How often each sample is trained on in an epoch."""

    flip: bool = False
    """Whether each sample is trained on mirrored left-right too."""

    columns: dict[str, str | list[str]] = {}
    """Which columns of a table hold `target`, `controls`, `prompt` and `mask`, where they have other names."""

    @field_validator("resolution", mode="before")
    @classmethod
    def _check_resolution(cls, value: Any) -> Any:
        several = value if isinstance(value, (list, tuple)) else [value]
        frames = [_frame(one) for one in several]
        if not frames or None in frames:
            raise PydanticCustomError(
                "resolution", f"a side in pixels, {SMALLEST_SIDE} or more, or a list of sides or [width, height]"
            )
        twice = next((one for number, one in enumerate(frames) if one in frames[:number]), None)
        if twice is not None:
            raise PydanticCustomError("resolution", f"each resolution once; {frame_name(twice)} is there twice")
        return [_written(frame) for frame in frames if frame] if isinstance(value, (list, tuple)) else _side(value)

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        bare = value.removeprefix(".")
        if not bare or "/" in bare:
            raise PydanticCustomError("caption_extension", "a file ending such as .txt or .caption")
        return f".{bare}"

    @field_validator("columns")
    @classmethod
    def _check_roles(cls, value: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        if not value.keys() <= set(ROLES):
            raise PydanticCustomError("columns", f"columns for {', '.join(ROLES)} and no other")
        return value

    @property
    def frames(self) -> tuple[Frame, ...]:
        """(width, height) in pixels of each resolution; equal sides where it is one number."""
        several = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return tuple((one, one) if isinstance(one, int) else one for one in several)

    @property
    def side(self) -> int:
        """Side in pixels of the square that has the area of the first resolution."""
        width, height = self.frames[0]
        return round(math.sqrt(width * height))


class SetConfig(SetSettings):
    """One of several data sets."""

    path: Path
    """As `data.path`."""


class DataConfig(SetSettings):
    """Where the samples are and to what size they are brought: one data set, or several that are trained on together.

    With `sets`, the settings of the section itself are those of every set that does not give its own.
    """

    sets: list[SetConfig] = []
    """Several data sets instead of `path`, each with the settings of this section that differ for it."""

    condition_resolution: int = Field(default=384, ge=SMALLEST_SIDE)
    """Side in pixels of the square whose area pictures shown to the vision-language text encoder are resized to."""

    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training steps in which the prompt is replaced by the empty prompt."""

    @model_validator(mode="before")
    @classmethod
    def _check_source(cls, values: Any) -> Any:
        """Exactly one of `path` and `sets`; each set is given what the section says for all of them.

        `sets: []` and no path is a job without a data set, such as making a picture from a prompt. Filled in here and
        not when it is read, because a saved config names every setting of every set.
        """
        if not isinstance(values, Mapping):
            return values
        path, sets = values.get("path"), values.get("sets")
        if path is None and sets == []:
            return {**values, "path": None}
        if not sets:
            return {name: value for name, value in values.items() if name != "path" or path is not None}
        if path is not None:
            problem = PydanticCustomError("two_sources", "either data.path or data.sets: move the path into the list")
            raise _error(problem, "path", path)
        if not isinstance(sets, list):
            return {**values, "path": None}
        shared = {name: values[name] for name in SetSettings.model_fields if name in values and name not in _PLACES}
        sets = [{**shared, **one} if isinstance(one, Mapping) else one for one in sets]
        return {**values, "path": None, "sets": sets}

    @property
    def every_set(self) -> list[SetConfig]:
        """The set at `path`, or those of `sets`, with all of their settings."""
        if self.path is None:
            return self.sets
        return [SetConfig.model_validate({name: getattr(self, name) for name in SetSettings.model_fields})]

    @property
    def paths(self) -> list[Path]:
        """Where the sets are."""
        return [one.path for one in self.every_set]

    def absolute(self) -> DataConfig:
        """The same with absolute paths, for a process that works in another folder."""

        def moved(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {**settings, **{name: located(settings[name]) for name in _PLACES if settings[name] is not None}}

        settings = moved(self.model_dump())
        return DataConfig.model_validate({**settings, "sets": [moved(one) for one in settings["sets"]]})

    def held_out(self, path: Path) -> DataConfig:
        """Settings for a set that is only looked at: each sample once, unmirrored, in the first resolution."""
        width, height = self.frames[0]
        settings = {
            **self.model_dump(exclude={"sets", "control_path"}),
            "path": path,
            "resolution": width if width == height else [(width, height)],
            "flip": False,
            "repeats": 1,
        }
        return DataConfig.model_validate(settings)


_PLACES = ("path", "control_path")


def frame_name(frame: Frame) -> str:
    """`768` for a square, else `960x544`."""
    width, height = frame
    return str(width) if width == height else f"{width}x{height}"


def _side(value: Any) -> int | None:
    """A side in pixels; None where it is none."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():  # from the command line
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= SMALLEST_SIDE else None


def _frame(value: Any) -> Frame | None:
    sides = [_side(one) for one in value] if isinstance(value, (list, tuple)) else [_side(value)] * 2
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    return sides[0], sides[1]


def _written(frame: Frame) -> int | Frame:
    return frame[0] if frame[0] == frame[1] else frame


def _error(problem: PydanticCustomError, field: str, found: Any) -> ValidationError:
    return ValidationError.from_exception_data("data", [InitErrorDetails(type=problem, loc=(field,), input=found)])


def located(path: Path) -> Path:
    """The absolute path; the id of a data set on the Hugging Face hub as it is."""
    return path if kind_of(path) == "hub" else path.absolute()
