"""Manifests come back as they were saved, or are an error that says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.toy_family import Job

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.errors import CacheError, StoreUnavailableError

NAMES = st.text(min_size=1, max_size=6)


KEYS = [f"{number:02x}" * 16 for number in range(3)]
DIGESTS = st.sampled_from(["file:" + "ab" * 16, "text:" + "cd" * 16, "text:" + "ab" * 16])
INPUTS = st.lists(st.fixed_dictionaries({"role": NAMES, "content": DIGESTS | NAMES}), max_size=3)
VALUES = st.integers() | NAMES | st.lists(NAMES, max_size=2)
RECIPES = st.fixed_dictionaries(
    {"artifact": NAMES, "transform": VALUES},
    optional={
        "inputs": INPUTS | VALUES,
        "storage": st.fixed_dictionaries({"rows_shared_with": st.sampled_from(KEYS) | NAMES}) | VALUES,
        "encoder": st.none() | st.fixed_dictionaries({"component": NAMES}),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(NAMES, st.dictionaries(NAMES, st.sampled_from(KEYS), max_size=3), max_size=4),
    st.dictionaries(st.sampled_from(KEYS), RECIPES, max_size=3),
    st.data(),
)
def test_a_manifest_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    samples: dict[str, dict[str, str]],
    recipes: dict[str, dict[str, object]],
    data: st.DataObject,
) -> None:
    """Whatever recipes hold: those that fit the table's form, and any others."""
    used = {key for artifacts in samples.values() for key in artifacts.values()}
    path = tmp_path_factory.mktemp("manifest") / "run" / "manifest.json"
    manifest = Manifest(samples, recipes, "toy")
    manifest.save(path)
    for one in (manifest, Manifest.load(path)):
        assert {name: dict(keys) for name, keys in one.samples.items()} == samples
        assert list(one.samples) == list(samples) and [list(keys) for keys in one.samples.values()] == [
            list(keys) for keys in samples.values()
        ]
        assert dict(one.recipes) == {key: recipe for key, recipe in recipes.items() if key in used}
        assert one.keys == used and one.family == "toy" and one == manifest
    left_out = data.draw(st.sets(st.sampled_from(sorted(samples)))) if samples else set()
    kept = manifest.without(left_out)
    assert dict(kept.samples) == {name: keys for name, keys in samples.items() if name not in left_out}


def test_a_manifest_differs_from_one_with_another_key(job: Job) -> None:
    first, second = Manifest({"a": {"x": KEYS[0]}}), Manifest({"a": {"x": KEYS[1]}})
    assert first != second and first == Manifest({"a": {"x": KEYS[0]}}) and first != Manifest({"b": {"x": KEYS[0]}})
    with pytest.raises(KeyError):
        first.samples["b"]
    with pytest.raises(KeyError):
        first.recipes[KEYS[0]]
    with pytest.raises(CacheError, match="'k1' is no key; expected 32 hex digits"):
        Manifest({"a": {"x": "k1"}})


def test_what_recipes_share_is_written_once(job: Job) -> None:
    job.cache()
    path = job.folder / "manifest.json"
    job.previous.save(path)  # type: ignore[union-attr]
    assert Manifest.load(path) == job.previous
    assert path.read_text().count(job.template) == 1
    assert path.stat().st_size < 42 * 200


def test_a_manifest_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(CacheError, match=r"no manifest .*cache the data set first"):
        Manifest.load(path)
    for damaged in (
        "",
        "{",
        "[]",
        '{"version":2}',
        '{"version":2,"fields":[],"parts":[],"recipes":{"k":[0]},"samples":{}}',
    ):
        path.write_text(damaged)
        with pytest.raises(CacheError, match="damaged"):
            Manifest.load(path)
    path.write_text('{"version":7}')
    with pytest.raises(CacheError, match="version 7; expected 2"):
        Manifest.load(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_manifest_is_an_error_or_unharmed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    inputs = [{"role": "prompt", "content": "text:" + "cd" * 16}]
    recipes = {key: {"artifact": "x", "inputs": inputs, "encoder": None} for key in KEYS}
    manifest = Manifest({"a": {"x": KEYS[0], "y": KEYS[1]}, "b": {"x": KEYS[2]}}, recipes, "toy")
    path = tmp_path_factory.mktemp("manifest") / "manifest.json"
    manifest.save(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 127).filter(lambda byte: byte != content[at]))
    path.write_bytes(content)
    try:
        found = Manifest.load(path)
    except CacheError:
        return
    assert found == manifest  # an upper-case digit, a blank for a line's end


def test_a_manifest_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    Manifest({"a": {}}).save(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreUnavailableError, match="No space left"):
        Manifest({"b": {}}).save(path)
    assert list(Manifest.load(path).samples) == ["a"]
    assert list(tmp_path.iterdir()) == [path]
