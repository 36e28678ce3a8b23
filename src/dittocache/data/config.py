"""Settings of the `data` section."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dittocache.settings import Settings


class DataConfig(Settings):
    """Where the samples are and to what size they are brought."""

    path: Path
    """Folder with `training_images/` (targets and `.txt` captions) and `control_images/` (what they are made from)."""

    resolution: int = Field(default=1024, ge=32)
    """Side in pixels of the square whose area pictures are resized to; the aspect ratio is kept."""

    condition_resolution: int = Field(default=384, ge=32)
    """The same for pictures shown to the vision-language text encoder."""

    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training steps in which the prompt is replaced by the empty prompt."""
