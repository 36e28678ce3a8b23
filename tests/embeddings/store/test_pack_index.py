"""The pack index: the right place or none, and an error of ours for whatever is not as it was written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dittocache.embeddings.store.pack_index import IndexDamagedError, PackIndex, Place

PACKS = {"a" * 32: 10_000, "b" * 32: 20_000}
KEYS = st.integers(0, 3) | st.integers(0, 2**128 - 1) | st.integers(0, 3).map(lambda low: (7 << 64) | low)
PLACES = st.builds(Place, st.sampled_from(list(PACKS)), st.integers(0, 2**63), st.integers(0, 2**63))


def as_key(number: int) -> str:
    return f"{number:032x}"


@given(st.dictionaries(KEYS.map(as_key), PLACES), st.lists(KEYS.map(as_key)))
def test_it_finds_what_it_was_given_and_nothing_else(places: dict[str, Place], others: list[str]) -> None:
    for index in (PackIndex.of(PACKS, list(places.items())), None):
        index = index or PackIndex.from_bytes(PackIndex.of(PACKS, list(places.items())).to_bytes())
        assert len(index) == len(places) and list(index.keys()) == sorted(places)
        asked = [*places, *others]
        rows = index.rows(asked).tolist()
        for key, row in zip(asked, rows, strict=True):
            assert (None if row < 0 else index.place(row)) == places.get(key) == index.find(key)


@given(st.dictionaries(KEYS.map(as_key), PLACES), st.dictionaries(KEYS.map(as_key), PLACES))
def test_more_packs_replace_and_fewer_remove(old: dict[str, Place], new: dict[str, Place]) -> None:
    c = "c" * 32
    moved = {key: Place(c, place.offset, place.length) for key, place in new.items()}
    index = PackIndex.of(PACKS, list(old.items())).with_packs({c: 5}, list(moved.items()))
    expected = old | moved
    assert {key: index.find(key) for key in expected} == expected and len(index) == len(expected)
    left = index.without_packs({"a" * 32})
    expected = {key: place for key, place in expected.items() if place.pack != "a" * 32}
    assert list(left.packs) == ["b" * 32, c]
    assert {key: left.find(key) for key in expected} == expected and len(left) == len(expected)


def example() -> PackIndex:
    choose = random.Random(3)
    return PackIndex.of(
        PACKS, [(as_key(choose.getrandbits(128)), Place(list(PACKS)[n % 2], 8 * n, 8)) for n in range(9)]
    )


def test_every_flipped_bit_is_found() -> None:
    content = example().to_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            with pytest.raises(IndexDamagedError):
                PackIndex.from_bytes(bytes(damaged))


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_are_an_error_of_ours_or_the_same_index(data: st.DataObject) -> None:
    content = example().to_bytes()
    damaged = bytearray(content)
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    damaged[start:end] = data.draw(st.binary(max_size=60))
    try:
        PackIndex.from_bytes(bytes(damaged))
    except IndexDamagedError:
        return
    assert bytes(damaged) == content


@given(st.binary(max_size=300))
def test_any_bytes_are_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(IndexDamagedError):
        PackIndex.from_bytes(content)
