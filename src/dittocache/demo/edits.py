"""The edits of the demo task: instructions in words, and what each does to a scene."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

from PIL import Image

from dittocache.demo.scenes import COLOURS, SHAPES, TEXTURES, Scene, Star, Texture, draw, place, random_scene

EXACT_KINDS = ("recolour", "remove", "border", "background", "grayscale")  # one right outcome
OPEN_KINDS = ("add", "stars", "texture")  # many right outcomes
NEW_KIND = "blueprint"  # the base model never sees it; the demo job's LoRA learns it
NEW_INSTRUCTION = "turn it into a blueprint"

# Colour is the hardest word to learn, so recolour has the largest share.
KIND_WEIGHTS = {
    "recolour": 0.30,
    "background": 0.15,
    "border": 0.13,
    "remove": 0.12,
    "grayscale": 0.06,
    "add": 0.10,
    "stars": 0.06,
    "texture": 0.08,
}
PHRASES: dict[str, tuple[str, ...]] = {
    "recolour": ("make the {shape} {colour}", "paint the {shape} {colour}", "turn the {shape} {colour}"),
    "remove": ("remove the {shape}", "erase the {shape}", "delete the {shape}", "take away the {shape}"),
    "border": ("add a {colour} border", "draw a {colour} border", "put a {colour} border around it"),
    "background": ("make the background {colour}", "paint the background {colour}", "turn the background {colour}"),
    "grayscale": ("make it {gray}", "turn it {gray}", "paint it {gray}"),
    "add": ("add a {colour} {shape}", "draw a {colour} {shape}"),
    "stars": ("scatter {colour} stars", "add {colour} stars", "draw {colour} stars"),
    "texture": ("add {colour} {texture}", "draw {colour} {texture}", "put {colour} {texture} on the background"),
}
GRAYS = ("gray", "grayscale", "colourless")
HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Edit:
    """One training or evaluation sample: source and target scene, the instruction and its kind."""

    kind: str
    instruction: str
    source: Scene
    target: Scene

    def images(self) -> tuple[Image.Image, Image.Image]:
        """Return the drawn (source, target), each 128x128 RGB."""
        return draw(self.source), draw(self.target)


def hash_share(text: str) -> float:
    """Map a text to [0, 1) by SHA-256, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def instructions(kind: str) -> list[str]:
    """All instruction strings of a kind."""
    texts = set()
    for phrase in PHRASES[kind]:
        for colour in COLOURS:
            for shape in SHAPES:
                for gray in GRAYS:
                    for texture in TEXTURES:
                        texts.add(phrase.format(colour=colour, shape=shape, gray=gray, texture=texture))
    return sorted(texts)


def held_out_instructions(kind: str) -> frozenset[str]:
    """The strings of a kind that training never sees: the lowest 15 % by hash, at least one."""
    texts = sorted(instructions(kind), key=hash_share)
    return frozenset(texts[: max(1, round(HELD_OUT_SHARE * len(texts)))])


_HELD_OUT = {kind: held_out_instructions(kind) for kind in PHRASES}


def instruction_held_out(kind: str, instruction: str) -> bool:
    """Say whether an instruction belongs to the evaluation only."""
    return instruction in _HELD_OUT[kind]


def scene_held_out(scene: Scene) -> bool:
    """Say whether a source scene belongs to the evaluation only."""
    return hash_share(repr(scene)) < HELD_OUT_SHARE


def make_edit(rng: random.Random, kind: str, source: Scene) -> Edit:
    """Draw one random edit of a kind for a source scene, with a random phrasing."""
    if kind not in PHRASES:
        raise ValueError(f"unknown edit kind {kind!r}; known kinds: {', '.join(PHRASES)}")
    phrase = rng.choice(PHRASES[kind])
    used = {source.ground, *(shape.colour for shape in source.shapes)}
    free = sorted(set(COLOURS) - used)
    words: dict[str, str] = {}
    if kind == "recolour":
        chosen = rng.choice(source.shapes)
        words = {"shape": chosen.kind, "colour": rng.choice(free)}
        shapes = tuple(replace(s, colour=words["colour"]) if s is chosen else s for s in source.shapes)
        target = replace(source, shapes=shapes)
    elif kind == "remove":
        chosen = rng.choice(source.shapes)
        words = {"shape": chosen.kind}
        target = replace(source, shapes=tuple(s for s in source.shapes if s is not chosen))
    elif kind == "border":
        words = {"colour": rng.choice(sorted(set(COLOURS) - {source.ground}))}
        target = replace(source, border=words["colour"])
    elif kind == "background":
        words = {"colour": rng.choice(free)}
        target = replace(source, ground=words["colour"])
    elif kind == "grayscale":
        words = {"gray": rng.choice(GRAYS)}
        target = replace(source, look="grayscale")
    elif kind == "add":
        present = {shape.kind for shape in source.shapes}
        words = {"shape": rng.choice(sorted(set(SHAPES) - present)), "colour": rng.choice(free)}
        new = place(rng, words["shape"], words["colour"], rng.uniform(13, 17), source.shapes)
        target = replace(source, shapes=(*source.shapes, new))
    elif kind == "stars":
        words = {"colour": rng.choice(free)}
        target = replace(source, stars=tuple(_star(rng, words["colour"]) for _ in range(5)))
    else:  # texture
        words = {"texture": rng.choice(TEXTURES), "colour": rng.choice(free)}
        texture = Texture(
            words["texture"], words["colour"], rng.uniform(0, 180), rng.uniform(26, 38), rng.uniform(0, 32)
        )
        target = replace(source, texture=texture)
    return Edit(kind, phrase.format(**words), source, target)


def _star(rng: random.Random, colour: str) -> Star:
    return Star(colour, rng.uniform(14, 114), rng.uniform(14, 114), rng.uniform(7, 10), rng.uniform(0, 72))


def new_edit(source: Scene) -> Edit:
    """The edit that the base model was not trained on: a blueprint of the source."""
    return Edit(NEW_KIND, NEW_INSTRUCTION, source, replace(source, look="blueprint"))


def _random_source(rng: random.Random, held_out: bool) -> Scene:
    while True:
        scene = random_scene(rng)
        if scene_held_out(scene) is held_out:
            return scene


def _edit_of_split(rng: random.Random, kind: str, source: Scene, held_out: bool) -> Edit | None:
    """Draw edits until the instruction falls into the split; None where this scene allows none."""
    for _ in range(60):
        edit = make_edit(rng, kind, source)
        if instruction_held_out(kind, edit.instruction) is held_out:
            return edit
    return None


def training_edits(count: int, seed: int = 0, edits_per_scene: int = 4) -> list[Edit]:
    """Draw the training set: scenes and instructions outside the held-out split.

    Each scene serves several edits, so that the model must read the instruction to know the target, and so that
    the source latents are encoded once for several samples.
    """
    rng = random.Random(f"train-{seed}")
    kinds, weights = list(KIND_WEIGHTS), list(KIND_WEIGHTS.values())
    edits: list[Edit] = []
    while len(edits) < count:
        source = _random_source(rng, held_out=False)
        for kind in rng.choices(kinds, weights, k=edits_per_scene):
            edit = _edit_of_split(rng, kind, source, held_out=False)
            if edit is not None:
                edits.append(edit)
    return edits[:count]


def evaluation_edits(count: int = 64, seed: int = 0) -> list[Edit]:
    """Draw the held-out set: every exact kind in turn, scenes and instruction strings never trained on."""
    rng = random.Random(f"evaluation-{seed}")
    edits: list[Edit] = []
    while len(edits) < count:
        kind = EXACT_KINDS[len(edits) % len(EXACT_KINDS)]
        edit = _edit_of_split(rng, kind, _random_source(rng, held_out=True), held_out=True)
        if edit is not None:
            edits.append(edit)
    return edits


def new_edits(count: int, *, held_out: bool, seed: int = 0) -> list[Edit]:
    """Draw samples of the new edit, on training or on held-out scenes."""
    rng = random.Random(f"new-{held_out}-{seed}")
    return [new_edit(_random_source(rng, held_out)) for _ in range(count)]
