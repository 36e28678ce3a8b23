"""The drawn task: determinism, the split, and that every edit changes what it says."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest

from dittocache.demo.edits import (
    EXACT_KINDS,
    NEW_INSTRUCTION,
    PHRASES,
    evaluation_edits,
    held_out_instructions,
    instructions,
    make_edit,
    new_edits,
    scene_held_out,
    training_edits,
)
from dittocache.demo.evaluate import carried_out, rest_kept
from dittocache.demo.scenes import BORDER_WIDTH, COLOURS, SIZE, draw, random_scene


def pixels(image):
    return np.asarray(image, dtype=np.int64)


def test_the_same_seed_draws_the_same_bytes():
    first, second = (
        hashlib.sha256(b"".join(draw(edit.target).tobytes() for edit in training_edits(24, seed=3))).hexdigest()
        for _ in range(2)
    )
    assert first == second
    other = hashlib.sha256(b"".join(draw(edit.target).tobytes() for edit in training_edits(24, seed=4))).hexdigest()
    assert first != other


def test_pictures_are_square_rgb_of_the_stated_size():
    image = draw(random_scene(random.Random(0)))
    assert image.mode == "RGB"
    assert image.size == (SIZE, SIZE) == (128, 128)


def test_training_and_evaluation_share_neither_scene_nor_instruction():
    training = training_edits(4000)
    evaluation = evaluation_edits(64)
    assert not {e.source for e in training} & {e.source for e in evaluation}
    assert not {e.instruction for e in training} & {e.instruction for e in evaluation}
    assert all(scene_held_out(e.source) for e in evaluation)
    assert not any(scene_held_out(e.source) for e in training)


def test_every_word_of_the_evaluation_is_seen_in_training():
    seen = {
        word
        for kind in PHRASES
        for text in set(instructions(kind)) - held_out_instructions(kind)
        for word in text.split()
    }
    wanted = {word for kind in PHRASES for text in held_out_instructions(kind) for word in text.split()}
    assert wanted <= seen


def test_evaluation_covers_every_exact_kind_about_equally():
    kinds = [edit.kind for edit in evaluation_edits(64)]
    assert {kind: kinds.count(kind) for kind in EXACT_KINDS} == {
        "recolour": 13,
        "remove": 13,
        "border": 13,
        "background": 13,
        "grayscale": 12,
    }


def test_the_base_model_never_sees_the_new_edit():
    assert NEW_INSTRUCTION not in {text for kind in PHRASES for text in instructions(kind)}
    assert all(edit.target.look != "blueprint" for edit in training_edits(2000))


@pytest.mark.parametrize("kind", sorted(PHRASES))
def test_every_edit_changes_the_picture(kind):
    rng = random.Random(1)
    for _ in range(20):
        source, target = make_edit(rng, kind, random_scene(rng)).images()
        assert (np.abs(pixels(source) - pixels(target)).max(axis=-1) > 20).sum() > 100


def test_a_border_changes_the_border_only():
    rng = random.Random(2)
    for _ in range(20):
        edit = make_edit(rng, "border", random_scene(rng))
        source, target = (pixels(image) for image in edit.images())
        w = BORDER_WIDTH
        assert (source[w:-w, w:-w] == target[w:-w, w:-w]).all()
        assert (target[0] == COLOURS[edit.target.border]).all()


def test_remove_leaves_the_ground_where_the_shape_was():
    rng = random.Random(3)
    edit = make_edit(rng, "remove", random_scene(rng))
    (gone,) = set(edit.source.shapes) - set(edit.target.shapes)
    assert (pixels(draw(edit.target))[round(gone.y), round(gone.x)] == COLOURS[edit.source.ground]).all()


def test_removing_both_shapes_is_carried_out_but_keeps_not_the_rest():
    rng = random.Random(5)
    source = next(scene for scene in (random_scene(rng) for _ in range(50)) if len(scene.shapes) == 2)
    edit = make_edit(rng, "remove", source)
    before, target = edit.images()
    nothing_left = draw(replace(edit.source, shapes=()))
    assert carried_out(nothing_left, before, target)
    assert not rest_kept(nothing_left, before, target)
    assert rest_kept(target, before, target)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown edit kind 'melt'"):
        make_edit(random.Random(0), "melt", random_scene(random.Random(0)))


def test_new_edit_samples_of_the_two_splits_share_no_scene():
    training, heldout = new_edits(40, held_out=False), new_edits(12, held_out=True)
    assert not {e.source for e in training} & {e.source for e in heldout}
