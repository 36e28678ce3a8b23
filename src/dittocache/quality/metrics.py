"""How far two pictures are apart: PSNR in decibels and SSIM.

Both compare 8-bit RGB values as they are stored (no linearisation, no crop), and both need pictures of
the same size: a picture that was resized to fit is not the picture that was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dittocache.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]
Picture: TypeAlias = Image.Image | Pixels

PSNR_CAP = 100.0
"""What an infinite PSNR counts as in means and in JSON, in dB.

Two pictures that differ by one level in one value of 128x128 RGB are 95 dB apart, and differences beyond
about 50 dB are invisible, so the cap tells identical from nearly identical and keeps means finite.
"""

SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window, and so the smallest side that SSIM is defined for."""

_LOSSLESS_MODES = ("RGB", "L", "1", "P")


def as_pixels(picture: Picture) -> Pixels:
    """The picture as 8-bit RGB values.

    Args:
        picture: a PIL image without transparency, or a uint8 array (H, W, 3) or (H, W).

    Returns:
        uint8 array (H, W, 3).

    Raises:
        DataError: the values are not 8-bit RGB and cannot be brought there without a choice that changes them.
    """
    if isinstance(picture, Image.Image):
        if picture.mode not in _LOSSLESS_MODES or picture.has_transparency_data:
            raise DataError(
                f"cannot compare a picture of mode {picture.mode!r}; expected 8-bit RGB or greys without "
                "transparency. Place it on a background and call .convert('RGB') first"
            )
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    if picture.dtype != np.uint8:
        raise DataError(
            f"cannot compare an array of {picture.dtype}; expected uint8 values from 0 to 255. "
            "For floats from 0 to 1: (array * 255).round().astype('uint8')"
        )
    if picture.ndim == 2:
        return np.repeat(picture[:, :, None], 3, axis=2)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise DataError(
            f"cannot compare an array of shape {picture.shape}; expected (height, width, 3), "
            "or (height, width) for greys"
        )
    return picture


def as_pair(a: Picture, b: Picture) -> tuple[Pixels, Pixels]:
    """Both pictures as uint8 (H, W, 3). Raises DataError when their sizes differ."""
    first, second = as_pixels(a), as_pixels(b)
    if first.shape != second.shape:
        raise DataError(
            f"the pictures have different sizes: {first.shape[1]}x{first.shape[0]} and "
            f"{second.shape[1]}x{second.shape[0]} (width x height). Make both at the same size; "
            "resizing one would measure the resizing"
        )
    if first.size == 0:
        raise DataError("the pictures are empty (0 pixels); expected at least one pixel")
    return first, second


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE), the mean taken over all pixels and channels.

    Returns:
        `math.inf` for identical pictures; see `capped` for means and JSON.

    Raises:
        DataError: the sizes differ, or the values are not 8-bit RGB.
    """
    first, second = as_pair(a, b)
    mean_squared_error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    if mean_squared_error == 0.0:
        return math.inf
    return 10.0 * math.log10(255.0**2 / mean_squared_error)


def capped(decibels: float) -> float:
    """A PSNR that can be averaged and written as JSON: at most `PSNR_CAP`."""
    return min(decibels, PSNR_CAP)


def mean(values: Sequence[float]) -> float:
    """Of the metrics of several pictures; not a number where there are none."""
    return sum(values) / len(values) if values else math.nan


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity, 1.0 for identical pictures, averaged over pixels and the three channels.

    Gaussian window of 11 pixels with sigma 1.5 and population covariance, as in Wang et al. 2004,
    "Image quality assessment: from error visibility to structural similarity".

    Raises:
        DataError: the sizes differ, a side is shorter than 11 pixels, or the values are not 8-bit RGB.
    """
    from skimage.metrics import structural_similarity

    first, second = as_pair(a, b)
    if min(first.shape[:2]) < SSIM_WINDOW:
        raise DataError(
            f"SSIM needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels; found "
            f"{first.shape[1]}x{first.shape[0]} (width x height)"
        )
    similarity: Callable[..., float] = structural_similarity  # scikit-image has no types
    value = similarity(
        first,
        second,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)
