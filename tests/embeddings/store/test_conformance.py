"""What every store promises, wherever it is."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.embeddings.store.places import Folder, Objects, Place, store_at

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import loose, remote
from dittocache.embeddings.store.record import pack
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

RECIPE: dict[str, Any] = {"artifact": "prompt_embeds", "schema": 1, "inputs": ["é", 1.5, None]}
KEY = recipe_key(RECIPE)
TENSOR = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(torch.bfloat16)


def numbered(number: int) -> dict[str, Any]:
    return {**RECIPE, "number": number}


@pytest.fixture(params=["folder", "file url", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "object store":
        url = f"memory://bucket/{tmp_path.name}"
        yield Objects(url)
        fsspec.filesystem("memory").rm(url, recursive=True)
        return
    folder = Folder(tmp_path / "a cache")
    if request.param == "file url":
        folder.location = f"file://{tmp_path}/a cache"
    yield folder


@pytest.fixture
def store(place: Place) -> Store:
    store = store_at(place)
    store.write(KEY, TENSOR, RECIPE)
    return store


def test_what_was_written_is_read_by_everyone(place: Place) -> None:
    length = store_at(place).write(KEY, TENSOR, RECIPE, provenance={"vae_tiling": True})
    reader = store_at(place)
    assert torch.equal(reader.read(KEY), TENSOR)
    assert reader.fetch(KEY) == place.get(KEY) == pack(KEY, TENSOR, RECIPE, {"vae_tiling": True})
    assert reader.sizes([KEY, "0" * 32]) == {KEY: length} and length == len(place.get(KEY)) == reader.bytes_of(KEY)
    assert KEY in reader and "0" * 32 not in reader and list(reader.keys()) == [KEY]
    assert reader.recipe_of(KEY) == RECIPE and reader.header(KEY).provenance == {"vae_tiling": True}


def test_an_empty_store_has_nothing(place: Place) -> None:
    store = store_at(place)
    assert KEY not in store and list(store.keys()) == [] and store.sizes([KEY]) == {} and store.sweep() == 0
    for ask in (store.read, store.bytes_of, store.recipe_of, store.fetch, store.header):
        with pytest.raises(RecordMissingError, match=KEY):
            ask(KEY)
    store.write(KEY, TENSOR, RECIPE)


def test_a_long_header_is_read_whole(store: Store) -> None:
    long = {**RECIPE, "transform": "x" * 9000}
    store.write(recipe_key(long), TENSOR, long)
    assert store.recipe_of(recipe_key(long)) == long and torch.equal(store.read(recipe_key(long)), TENSOR)


def test_writing_again_changes_nothing_unless_it_is_to_replace(store: Store, place: Place) -> None:
    before = place.get(KEY)
    assert store.write(KEY, TENSOR + 1, RECIPE) == len(before) and place.get(KEY) == before
    store.write(KEY, TENSOR + 1, RECIPE, replace=True)
    assert torch.equal(store.read(KEY), TENSOR + 1)


def test_what_is_no_key_or_another_recipes_is_refused(store: Store) -> None:
    with pytest.raises(CacheError, match="does not belong to this recipe"):
        store.write("0" * 32, TENSOR, RECIPE)
    for ask in (store.read, store.fetch, store.header):
        with pytest.raises(CacheError, match="is no key"):
            ask("../../etc/passwd")


@pytest.mark.parametrize("fault", ["flipped bit", "torn", "grown", "empty", "another record"])
def test_a_record_that_does_not_prove_itself_is_never_read_and_then_missing(
    store: Store, place: Place, fault: str
) -> None:
    good = place.get(KEY)
    other = {**RECIPE, "schema": 2}
    bad = {
        "flipped bit": good[:-1] + bytes([good[-1] ^ 1]),
        "torn": good[:-1],
        "grown": good + b"\0",
        "empty": b"",
        "another record": pack(recipe_key(other), TENSOR, other),
    }[fault]
    place.put(KEY, bad)
    with pytest.raises(RecordCorruptError, match=f"record {KEY}.*moved to.*quarantine"):
        store.read(KEY)
    assert place.quarantined() == [bad]
    assert KEY not in store
    with pytest.raises(RecordMissingError):
        store.read(KEY)
    store.write(KEY, TENSOR, RECIPE)
    assert torch.equal(store.read(KEY), TENSOR)


def test_many_keys_are_found_by_listing(store: Store, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [numbered(number) for number in range(20)]
    lengths = {recipe_key(recipe): store.write(recipe_key(recipe), TENSOR, recipe) for recipe in recipes}
    place.put(f"{KEY[:2]}".ljust(32, "0"), b"anybody's")
    asked = [*lengths, "0" * 32]
    each = store.sizes(asked)
    for module in (loose, remote):
        monkeypatch.setattr(module, "LISTING_FROM", 1)
    assert store.sizes(asked) == each == lengths
    monkeypatch.setattr(remote, "LISTING_BY_PREFIX_FROM", 1)
    assert store.sizes(iter(asked)) == lengths
    assert set(store.keys()) >= {KEY, *lengths}


def test_a_listing_shows_what_others_wrote_meanwhile(store: Store, place: Place) -> None:
    assert set(store.keys()) == {KEY}
    other = numbered(1)
    store_at(place).write(recipe_key(other), TENSOR, other)
    assert set(store.keys()) == {KEY, recipe_key(other)} and recipe_key(other) in store


def test_rows_are_shared_between_records(store: Store) -> None:
    base = {**RECIPE, "artifact": "empty_prompt_embeds"}
    made = {**RECIPE, "storage": {"rows_shared_with": recipe_key(base)}}
    store.write(recipe_key(base), TENSOR.repeat(40, 1), base)
    prompt = torch.cat([TENSOR.repeat(40, 1), TENSOR + 1])
    store.write(recipe_key(made), prompt, made)
    assert torch.equal(store.read(recipe_key(made)), prompt)
    assert store.header(recipe_key(made)).needs_base


def test_another_process_gets_the_same_store(store: Store) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert type(again) is type(store) and again.location == store.location
    assert torch.equal(again.read(KEY), TENSOR)


def test_writers_at_once_all_succeed(place: Place) -> None:
    recipes = [numbered(number % 7) for number in range(28)]

    def write(recipe: dict[str, Any]) -> None:
        store_at(place).write(recipe_key(recipe), TENSOR + recipe["number"], recipe)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, recipes))
    reader = store_at(place)
    assert len(list(reader.keys())) == 7
    for recipe in recipes:
        assert torch.equal(reader.read(recipe_key(recipe)), TENSOR + recipe["number"])


def test_another_layout_is_left_alone(store: Store, place: Place) -> None:
    place.put_layout(b'{"version": 99}')
    with pytest.raises(CacheError, match="layout 99.*upgrade dittocache"):
        store_at(place)
    place.put_layout(b"{")
    with pytest.raises(CacheError, match=r"layout.json is damaged.*remove it"):
        store_at(place)
