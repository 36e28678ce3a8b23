"""Run Edit-Plus at sizes other than its 1024x1024: the one place that sets the pipeline's module constants."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dittocache.families.base import Sizes

# The constants belong to the whole process: a second thread waits until the first one's sizes are no longer needed.
_constants = threading.RLock()


@contextmanager
def pipeline_sizes(sizes: Sizes) -> Iterator[None]:
    """Set `VAE_IMAGE_SIZE` and `CONDITION_IMAGE_SIZE` of diffusers' Edit-Plus, and restore them after.

    The pipeline reads them whenever it is called. `height` and `width` of the picture itself are arguments of the
    call and must be passed as well (`output_size`). Other pipelines are not affected.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    module: Any = edit_plus
    with _constants:
        before = module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE
        module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = sizes.resolution**2, sizes.condition_resolution**2
        try:
            yield
        finally:
            module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = before


def output_size(picture_sizes: Sequence[tuple[int, int]], sizes: Sizes) -> tuple[int, int]:
    """(width, height) in pixels that Edit-Plus gives an edit: the last picture's ratio at the area of `resolution`.

    A square without pictures. Both sides are multiples of 32.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    width, height = picture_sizes[-1] if picture_sizes else (1, 1)
    across, down = calculate_dimensions(sizes.resolution**2, width / height)
    return int(across), int(down)
