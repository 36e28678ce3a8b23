"""FLIP: how much a person sees who flips between two pictures, 0 (nothing) to 1.

Andersson, Nilsson, Akenine-Moller, Oskarsson, Astrom, Fairchild, "FLIP: A Difference Evaluator for Alternating Images",
HPG 2020 (LDR-FLIP). Colours are blurred as an eye at a distance blurs them and compared in a perceptually uniform
space; differences at edges and points, which the eye is drawn to, count more. Section and equation numbers are the
paper's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dittocache.quality.metrics import Picture, as_pair

Floats = NDArray[np.float64]

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180
"""The paper's viewing condition: a 0.7 m wide display of 3840 pixels, 0.7 m away."""

_WHITE = np.array([0.950428545, 1.0, 1.088900371])  # XYZ of D65
_TO_XYZ = np.array(  # of linear sRGB, rows X, Y, Z
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ]
)
_TO_RGB = np.linalg.inv(_TO_XYZ)
_SENSITIVITY = (  # eq. 5: (a1, b1, a2, b2) of the contrast sensitivity's Gaussians: luminance, red-green, blue-yellow
    (1.0, 0.0047, 0.0, 1e-5),
    (1.0, 0.0053, 0.0, 1e-5),
    (34.1, 0.04, 13.5, 0.025),
)
_COLOUR_POWER, _KNEE, _KNEE_HEIGHT = 0.7, 0.4, 0.95  # qc, pc, pt of section 4.1
_FEATURE_WIDTH, _FEATURE_POWER = 0.082, 0.5  # degrees, and qf, of section 4.2


def flip(a: Picture, b: Picture, pixels_per_degree: float = PIXELS_PER_DEGREE) -> float:
    """Mean of the FLIP map of two pictures; 0.0 for identical ones, at most 1.

    Args:
        a, b: 8-bit pictures of one size, as for `psnr`; the order makes no difference.
        pixels_per_degree: how close they are looked at.

    Raises:
        DataError: the sizes differ, or the values are not 8-bit RGB.
    """
    return float(flip_map(a, b, pixels_per_degree).mean())


def flip_map(a: Picture, b: Picture, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Floats:
    """The difference of each pixel, (H, W) from 0 to 1; arguments and errors as for `flip`."""
    first, second = (_opponent(_linear(pixels / 255.0)) for pixels in as_pair(a, b))
    colour = _colour_difference(first, second, pixels_per_degree)
    feature = _feature_difference(first[..., 0], second[..., 0], pixels_per_degree)
    differences: Floats = np.power(colour, 1.0 - feature)  # eq. 20
    return differences


def _colour_difference(first: Floats, second: Floats, pixels_per_degree: float) -> Floats:
    """Section 4.1: blur, distance, and a redistribution that gives small differences most of the range."""
    hyab = _hyab(*(_hunt(_seen(one, pixels_per_degree)) for one in (first, second)))
    power = np.power(hyab, _COLOUR_POWER)
    green, blue = (np.array([[rgb]], dtype=np.float64) for rgb in ((0, 1, 0), (0, 0, 1)))
    largest = float(_hyab(_hunt(green), _hunt(blue)).item()) ** _COLOUR_POWER
    knee = _KNEE * largest
    above = _KNEE_HEIGHT + (power - knee) / (largest - knee) * (1.0 - _KNEE_HEIGHT)
    spread: Floats = np.clip(np.where(power < knee, power * _KNEE_HEIGHT / knee, above), 0.0, 1.0)
    return spread


def _seen(opponent: Floats, pixels_per_degree: float) -> Floats:
    """Linear RGB after the eye's contrast sensitivity, eqs. 4 to 6."""
    widest = max(max(b1, b2) for _, b1, _, b2 in _SENSITIVITY)
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * pixels_per_degree)
    squared = (np.arange(-radius, radius + 1) / pixels_per_degree) ** 2
    blurred = np.empty_like(opponent)
    for channel, (a1, b1, a2, b2) in enumerate(_SENSITIVITY):
        total, weight = np.zeros(opponent.shape[:2]), 0.0
        for height, width in ((a1, b1), (a2, b2)):  # each Gaussian is the product of one along y and one along x
            line = np.exp(-(math.pi**2) * squared / width)
            scale = height * math.pi / width
            total += scale * _filtered(opponent[..., channel], line, line)
            weight += scale * line.sum() ** 2
        blurred[..., channel] = total / weight
    return np.clip(_from_opponent(blurred), 0.0, 1.0)


def _feature_difference(first: Floats, second: Floats, pixels_per_degree: float) -> Floats:
    """Section 4.2: how differently edges and points stand out in the luminance, eqs. 15 to 19."""
    deviation = 0.5 * _FEATURE_WIDTH * pixels_per_degree
    radius = math.ceil(3 * deviation)
    x = np.arange(-radius, radius + 1, dtype=np.float64)
    smooth = np.exp(-(x**2) / (2 * deviation**2))
    edge = -x * smooth
    point = (x**2 / deviation**2 - 1) * smooth
    strengths = []
    for luminance in (first, second):
        grey = (luminance + 16) / 116
        strengths.append([_strength(grey, kernel, smooth) for kernel in (edge, point)])
    edges, points = (np.abs(one - other) for one, other in zip(*strengths, strict=True))
    difference: Floats = np.power(np.maximum(edges, points) / math.sqrt(2), _FEATURE_POWER)
    return difference


def _strength(grey: Floats, kernel: Floats, smooth: Floats) -> Floats:
    """Norm of the responses along x and y; a kernel's positive weights add up to 1, its negative ones to -1."""
    plane = np.outer(smooth, kernel)
    scaled = np.where(plane > 0, plane / plane[plane > 0].sum(), plane / -plane[plane < 0].sum())
    # The sign of the plane is that of `kernel`, so the scaled plane is still a product of two lines.
    line = scaled.sum(axis=0)
    column = smooth / smooth.sum()
    return np.hypot(_filtered(grey, column, line), _filtered(grey, line, column))


def _filtered(plane: Floats, along_y: Floats, along_x: Floats) -> Floats:
    """Correlation with two lines, edge pixels repeated outwards; shape (H, W) kept."""
    radius = len(along_x) // 2
    height, width = plane.shape
    padded = np.pad(plane, radius, mode="edge")
    rows = np.zeros((height + 2 * radius, width))
    for offset, weight in enumerate(along_x):
        rows += weight * padded[:, offset : offset + width]
    found = np.zeros((height, width))
    for offset, weight in enumerate(along_y):
        found += weight * rows[offset : offset + height]
    return found


def _hyab(first: Floats, second: Floats) -> Floats:
    """City-block distance in lightness, Euclidean in the two colour axes, eq. 9."""
    difference = first - second
    distance: Floats = np.abs(difference[..., 0]) + np.hypot(difference[..., 1], difference[..., 2])
    return distance


def _hunt(rgb: Floats) -> Floats:
    """CIELAB of linear RGB, with colourfulness that grows with lightness, eqs. 7 and 8."""
    scaled = (rgb @ _TO_XYZ.T) / _WHITE
    delta = 6 / 29
    root = np.where(scaled > delta**3, np.cbrt(scaled), scaled / (3 * delta**2) + 4 / 29)
    lightness = 116 * root[..., 1] - 16
    a, b = 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])
    return np.stack([lightness, 0.01 * lightness * a, 0.01 * lightness * b], axis=-1)


def _linear(srgb: Floats) -> Floats:
    linear: Floats = np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    return linear


def _opponent(rgb: Floats) -> Floats:
    """YCxCz, a linear version of CIELAB, of linear RGB."""
    x, y, z = np.moveaxis((rgb @ _TO_XYZ.T) / _WHITE, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _from_opponent(opponent: Floats) -> Floats:
    """Linear RGB of YCxCz."""
    y = (opponent[..., 0] + 16) / 116
    x, z = y + opponent[..., 1] / 500, y - opponent[..., 2] / 200
    rgb: Floats = (np.stack([x, y, z], axis=-1) * _WHITE) @ _TO_RGB.T
    return rgb
