"""Run the Qwen-Image edit pipelines at sizes other than 1024x1024: the one place that sets their modules' globals."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dittocache.families.base import Sizes

# They belong to the whole process: a second thread waits until the first one's sizes are no longer needed.
_globals = threading.RLock()


@contextmanager
def pipeline_sizes(sizes: Sizes) -> Iterator[None]:
    """Let diffusers' Edit and Edit-Plus resize the pictures they edit to `sizes`, and restore what they do after.

    Edit-Plus reads `VAE_IMAGE_SIZE` and `CONDITION_IMAGE_SIZE` whenever it is called. Edit asks its
    `calculate_dimensions` for the sides of a literal 1024 * 1024 pixels: here that function takes the area of
    `resolution` instead. `height` and `width` of the picture itself are arguments of the call and must be passed as
    well (`output_size`). Other pipelines are not affected.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    edit: Any = pipeline_qwenimage_edit
    plus: Any = pipeline_qwenimage_edit_plus
    area = sizes.resolution**2
    with _globals:
        before = plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE, edit.calculate_dimensions
        plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE = area, sizes.condition_resolution**2
        edit.calculate_dimensions = lambda _, ratio: (*plus.calculate_dimensions(area, ratio), None)
        try:
            yield
        finally:
            plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE, edit.calculate_dimensions = before


def output_size(picture_sizes: Sequence[tuple[int, int]], sizes: Sizes) -> tuple[int, int]:
    """(width, height) in pixels that the edit pipelines give an edit: the last picture's ratio at the area of `resolution`.

    A square without pictures. Both sides are multiples of 32.
    """
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    width, height = picture_sizes[-1] if picture_sizes else (1, 1)
    across, down = calculate_dimensions(sizes.resolution**2, width / height)
    return int(across), int(down)
