"""FLUX.1 text to image: dev (guidance-distilled) and schnell. Encoding side."""

from __future__ import annotations

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.flux_common import FluxFamily, SizeOf
from dittocache.families.pictures import PictureRequest


class Flux(FluxFamily):
    """Encoding side of FLUX.1-dev, family `flux`; without guidance of FLUX.1-schnell."""

    pipeline_class_name = "FluxPipeline"

    def __init__(self, name: str = "flux", guidance: bool = True) -> None:
        super().__init__(name, guidance)

    def controls(self, sample: Sample, sizes: Sizes, size_of: SizeOf = picture_size) -> list[PictureRequest]:
        """None; raises DataError where the sample has control pictures."""
        if sample.controls:
            raise DataError(
                f"sample {sample.name!r} has control pictures that {self.name} cannot use: "
                f"{', '.join(map(str, sample.controls))}; FLUX.1 text to image takes none: remove them, "
                "or choose flux-kontext with a FLUX.1-Kontext checkpoint"
            )
        return []
