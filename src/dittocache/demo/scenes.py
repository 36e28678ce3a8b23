"""Draw the scenes of the demo task: a plain ground with one or two large shapes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 128  # pixels a side of every drawn image
SUPERSAMPLE = 3  # drawn this much larger, then box-filtered, so that edges are antialiased

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 70),
    "blue": (40, 80, 214),
    "yellow": (242, 204, 48),
    "white": (244, 244, 244),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("stripes", "checks")
BORDER_WIDTH = 9  # pixels
BLUEPRINT_GROUND = (16, 44, 116)
BLUEPRINT_FILL = (52, 104, 190)
BLUEPRINT_LINE = (236, 242, 250)
BLUEPRINT_LINE_WIDTH = 5  # pixels


@dataclass(frozen=True)
class Shape:
    """One shape: its kind, colour, centre and radius, the lengths in pixels of the 128-pixel image."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Texture:
    """A two-colour pattern on the ground: kind, second colour, angle in degrees, period in pixels, phase in pixels."""

    kind: str
    colour: str
    angle: float
    period: float
    phase: float


@dataclass(frozen=True)
class Star:
    """One small five-pointed star, the lengths in pixels, the turn in degrees."""

    colour: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn, from the ground up; `look` is `plain`, `grayscale` or `blueprint`."""

    ground: str
    shapes: tuple[Shape, ...] = ()
    texture: Texture | None = None
    stars: tuple[Star, ...] = ()
    border: str | None = None
    look: str = "plain"


def draw(scene: Scene) -> Image.Image:
    """Render a scene as a 128x128 RGB image; the same scene always gives the same bytes."""
    side = SIZE * SUPERSAMPLE
    blueprint = scene.look == "blueprint"
    ground = BLUEPRINT_GROUND if blueprint else COLOURS[scene.ground]
    canvas = Image.new("RGB", (side, side), ground)
    if scene.texture is not None and not blueprint:
        canvas.paste(COLOURS[scene.texture.colour], (0, 0), _texture_mask(scene.texture, side))
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        if blueprint:
            _fill(pen, shape, BLUEPRINT_LINE, 0.0)
            _fill(pen, shape, BLUEPRINT_FILL, BLUEPRINT_LINE_WIDTH)
        else:
            _fill(pen, shape, COLOURS[shape.colour], 0.0)
    for star in scene.stars:
        pen.polygon(_star_points(star), fill=COLOURS[star.colour])
    if scene.border is not None:
        width = BORDER_WIDTH * SUPERSAMPLE
        pen.rectangle((0, 0, side - 1, side - 1), outline=COLOURS[scene.border], width=width)
    image = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    if scene.look == "grayscale":
        image = image.convert("L").convert("RGB")
    return image


def _fill(pen: ImageDraw.ImageDraw, shape: Shape, colour: tuple[int, int, int], inset: float) -> None:
    """Fill a shape, shrunk by `inset` pixels on every side."""
    s = SUPERSAMPLE
    x, y, r = shape.x, shape.y, shape.radius - inset
    if shape.kind == "circle":
        pen.ellipse(((x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s), fill=colour)
    elif shape.kind == "square":
        h = shape.radius * 0.88 - inset
        pen.rectangle(((x - h) * s, (y - h) * s, (x + h) * s, (y + h) * s), fill=colour)
    elif shape.kind == "triangle":
        # An equilateral triangle moves each side in by `inset` when its circumradius shrinks by twice that.
        c = shape.radius * 1.15 - 2.0 * inset
        cy = y + shape.radius * 0.22
        corners = [(x + c * math.sin(a), cy - c * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        pen.polygon([(u * s, v * s) for u, v in corners], fill=colour)
    else:
        raise ValueError(f"unknown shape {shape.kind!r}; known shapes: {', '.join(SHAPES)}")


def _star_points(star: Star) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius = star.radius * (1.0 if corner % 2 == 0 else 0.45)
        angle = math.radians(star.turn) + corner * math.pi / 5
        points.append(
            ((star.x + radius * math.sin(angle)) * SUPERSAMPLE, (star.y - radius * math.cos(angle)) * SUPERSAMPLE)
        )
    return points


def _texture_mask(texture: Texture, side: int) -> Image.Image:
    """A mode-L mask, 255 where the second colour shows: an axis-aligned pattern, then turned."""
    span = int(side * 1.5)  # covers the picture's corners at every angle
    mask = Image.new("L", (span, span), 0)
    pen = ImageDraw.Draw(mask)
    half = texture.period * SUPERSAMPLE / 2
    offset = texture.phase * SUPERSAMPLE
    cells = int(span / half) + 4
    for row in range(-2, cells):
        low, high = row * half + offset, (row + 1) * half + offset
        if texture.kind == "stripes":
            if row % 2 == 0:
                pen.rectangle((0, low, span, high - 1), fill=255)
            continue
        for column in range(-2, cells):
            if (row + column) % 2 == 0:
                left = column * half + offset
                pen.rectangle((left, low, left + half - 1, high - 1), fill=255)
    turned = mask.rotate(texture.angle, Image.Resampling.BILINEAR)
    margin = (span - side) // 2
    return turned.crop((margin, margin, margin + side, margin + side))


def random_scene(rng: random.Random) -> Scene:
    """Draw a random source scene: one or two shapes of different kinds, colours all different."""
    ground, first, second = rng.sample(sorted(COLOURS), 3)
    kinds = rng.sample(SHAPES, 2)
    if rng.random() < 0.4:
        radius = rng.uniform(24, 36)
        return Scene(ground, (place(rng, kinds[0], first, radius, ()),))
    # Two shapes share the picture: one in each half, left and right or top and bottom.
    across = rng.random() < 0.5
    shapes = []
    for kind, colour, low in zip(kinds, (first, second), rng.sample((14.0, 66.0), 2), strict=True):
        radius = rng.uniform(19, 23)
        along = rng.uniform(low + radius, low + 48 - radius)
        other = rng.uniform(14 + radius, SIZE - 14 - radius)
        shapes.append(Shape(kind, colour, *((along, other) if across else (other, along)), radius))
    return Scene(ground, tuple(shapes))


def place(rng: random.Random, kind: str, colour: str, radius: float, others: tuple[Shape, ...]) -> Shape:
    """Put a shape where it touches neither the border's place nor another shape (best of 40 tries)."""
    low, high = BORDER_WIDTH + 5 + radius, SIZE - BORDER_WIDTH - 5 - radius
    best, best_gap = None, -math.inf
    for _ in range(40):
        shape = Shape(kind, colour, rng.uniform(low, high), rng.uniform(low, high), radius)
        gap = min(
            (math.hypot(shape.x - o.x, shape.y - o.y) - 1.15 * (radius + o.radius) for o in others), default=math.inf
        )
        if gap > best_gap:
            best, best_gap = shape, gap
        if gap > 0:
            break
    assert best is not None
    return best
