"""FLUX.1-Kontext: edits of one reference picture. Encoding side.

The stock pipeline brings its reference to one of the 17 sizes that the model was trained on, of about one megapixel
each: the one whose ratio is nearest (`PREFERRED_KONTEXT_RESOLUTIONS`). So does dittocache where pictures have the area
of 1024 x 1024. For another `resolution` these sizes are scaled by `resolution` / 1024 and rounded to multiples of 16;
sampling then hands the pipeline a reference of that size with `_auto_resize=False`, so that it is left as it is.
"""

from __future__ import annotations

from typing import Literal

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.flux_common import FluxFamily, SizeOf
from dittocache.families.packed_latents import PACKED_PIXELS
from dittocache.families.pictures import PictureRequest

PREFERRED_SIDE = 1024  # side of the square whose area the preferred sizes have


class FluxKontext(FluxFamily):
    """Encoding side of FLUX.1-Kontext-dev, which is guidance-distilled."""

    pipeline_class_name = "FluxKontextPipeline"

    def __init__(self) -> None:
        super().__init__("flux-kontext", guidance=True)

    def controls(self, sample: Sample, sizes: Sizes, size_of: SizeOf = picture_size) -> list[PictureRequest]:
        """The one reference; raises DataError where the sample has none or several."""
        if len(sample.controls) != 1:
            raise DataError(
                f"sample {sample.name!r} has {len(sample.controls)} control pictures; {self.name} edits exactly one, "
                "as its pipeline does: give one (control_images/ beside training_images/), join several into one "
                "picture, or choose a checkpoint of qwen-image-edit-plus for several, flux for none"
            )
        [path] = sample.controls
        resolution = sizes.resolution if sample.control_resolution is None else sample.control_resolution
        size = reference_size(*size_of(path), resolution)
        return [PictureRequest(path, size=size, flipped=sample.flipped)]


def reference_size(width: int, height: int, resolution: int | Literal["own"]) -> tuple[int, int]:
    """(width, height) in pixels that a reference of this size is brought to; both sides are multiples of 16.

    At `resolution` 1024 the preferred size that the stock pipeline chooses, at others that size scaled; `own` keeps
    the picture's own size, cut to multiples as the pipeline does without its `_auto_resize`.
    """
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    own = _multiple(width, down=True), _multiple(height, down=True)
    if resolution == "own":
        return own
    # The pipeline compares the ratio of the sides that it has cut to multiples.
    ratio = own[0] / own[1]
    _, *preferred = min((abs(ratio - across / down), across, down) for across, down in PREFERRED_KONTEXT_RESOLUTIONS)
    across, down = (_multiple(side * resolution / PREFERRED_SIDE) for side in preferred)
    return across, down


def _multiple(side: float, down: bool = False) -> int:
    multiples = int(side // PACKED_PIXELS) if down else round(side / PACKED_PIXELS)
    return max(1, multiples) * PACKED_PIXELS
