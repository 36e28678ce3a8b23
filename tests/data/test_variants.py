"""What settings make of a sample: names, sizes, mirrored twins, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dittocache.data.config import SetConfig
from dittocache.data.variants import Treatment, Wording, treatment_of


def treatment(**settings: Any) -> Treatment:
    return treatment_of(SetConfig(path=Path("set"), **settings), 16, 1024)


def test_a_set_without_special_settings_has_one_variant_that_changes_nothing() -> None:
    found = treatment()
    [variant] = found.variants
    assert (variant.suffix, variant.flipped, variant.cropped, variant.control_resolution) == ("", False, False, None)
    assert (variant.buckets.frame, variant.buckets.step) == ((1024, 1024), 16)
    assert found.names(["a", "b/c"]) == ["a", "b/c"]


def test_each_resolution_has_a_mirrored_twin_and_names_say_which() -> None:
    found = treatment(resolution=[1024, 768, (960, 544)], flip=True)
    assert found.names(["x"]) == ["x", "x@flipped", "x@768", "x@768@flipped", "x@960x544", "x@960x544@flipped"]
    assert [variant.flipped for variant in found.variants] == [False, True] * 3
    assert [variant.buckets.frame for variant in found.variants[::2]] == [(1024, 1024), (768, 768), (960, 544)]


@given(st.lists(st.text(min_size=1).filter(lambda name: "@" not in name), unique=True), st.booleans())
def test_names_are_unique(names: list[str], flip: bool) -> None:
    found = treatment(resolution=[512, 768], flip=flip).names(names)
    assert len(set(found)) == len(found) == len(names) * (4 if flip else 2)


def test_controls_follow_their_target_unless_they_have_a_resolution_of_their_own() -> None:
    def controls(**settings: Any) -> list[Any]:
        return [variant.control_resolution for variant in treatment(**settings).variants]

    assert controls(resolution=[1024, 768, (960, 544)]) == [None, 768, 723]
    assert controls(resolution=[1024, 768], control_resolution=512) == [512, 512]
    assert controls(resolution=[1024, 768], control_resolution=1024) == [None, None]
    assert controls(resolution=[1024, 768], resize_controls=False) == ["own", "own"]


def test_steps_upscaling_and_cropping_reach_the_buckets() -> None:
    [variant] = treatment(bucket_step=64, upscale=False, buckets=False, resolution=512).variants
    assert variant.buckets.size_of(300, 4000) == (256, 512)
    assert variant.cropped


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", "a dog"),
        ("a photo of", "a photo of, a dog"),
        ("a photo of ", "a photo of a dog"),
        ("photo:", "photo: a dog"),
        ("line\n", "line\na dog"),
        ("写真", "写真, a dog"),
    ],
)
def test_a_prefix_is_joined_as_its_last_character_asks(prefix: str, expected: str) -> None:
    assert Wording(prefix).prompt("a dog") == expected


@pytest.mark.parametrize(
    ("trigger", "caption", "expected"),
    [
        ("ohwx", "a dog", "ohwx, a dog"),
        ("ohwx", "a dog, ohwx", "a dog, ohwx"),
        ("ohwx", "OHWX dog", "OHWX dog"),
        ("art", "a party", "art, a party"),
        ("c++", "a c++ book", "a c++ book"),
        ("犬", "黒い犬が走る", "黒い犬が走る"),
        ("猫", "黒い犬が走る", "猫, 黒い犬が走る"),
    ],
)
def test_a_trigger_word_is_there_once(trigger: str, caption: str, expected: str) -> None:
    wording = Wording(trigger=trigger)
    assert wording.prompt(caption) == expected
    assert wording.prompt(wording.prompt(caption)) == expected


def test_the_trigger_word_stands_before_the_prefix_unless_the_prefix_has_it() -> None:
    assert Wording("a photo of ", "ohwx").prompt("a dog") == "ohwx, a photo of a dog"
    assert Wording("a photo of ohwx, ", "ohwx").prompt("a dog") == "a photo of ohwx, a dog"
