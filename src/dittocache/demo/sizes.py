"""Run Edit-Plus at sizes other than its 1024x1024: the one place that sets the pipeline's module constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

DEMO_VAE_AREA = 128 * 128  # pixels of a reference image that the VAE sees: 64 packed latent tokens
DEMO_CONDITION_AREA = 64 * 64  # pixels that the text encoder sees: 4 image tokens


@contextmanager
def pipeline_sizes(vae_area: int = DEMO_VAE_AREA, condition_area: int = DEMO_CONDITION_AREA) -> Iterator[None]:
    """Set `VAE_IMAGE_SIZE` and `CONDITION_IMAGE_SIZE` of diffusers' Edit-Plus, and restore them after.

    Both are areas in pixels; the pipeline reads them whenever it is called. `height` and `width` of the picture
    itself are arguments of the call and must be passed as well. The constants belong to the whole process: two
    threads must not use different sizes at once.
    """
    before = edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE
    edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE = vae_area, condition_area
    try:
        yield
    finally:
        edit_plus.VAE_IMAGE_SIZE, edit_plus.CONDITION_IMAGE_SIZE = before
