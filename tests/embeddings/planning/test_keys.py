"""Keys by the fast way are those of `recipe_key`, and recipes come back from the table that holds them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.toy_family import Job

from dittocache.data.digests import ContentIndex
from dittocache.embeddings.planning.identity import encoder_identity
from dittocache.embeddings.planning.keyindex import KeyIndex
from dittocache.embeddings.planning.keys import KeyMaker
from dittocache.embeddings.planning.keytable import KeyTable
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.recipe import artifact_recipe, recipe_key
from dittocache.embeddings.store.storage import Storage, storage_field

STORAGES = [Storage(), Storage("float16"), Storage("fp8"), Storage(shared_prefix=True), Storage("fp8", True)]


def maker_of(job: Job, storage: Storage = STORAGES[0]) -> KeyMaker:
    index = ContentIndex(job.folder / "index.json")
    identities = {
        encoder: encoder_identity(job.model, encoder, beside, torch.bfloat16, index)
        for encoder, beside in job.family.encoders.items()
    }
    return KeyMaker(job.family, job.sizes, identities, index, storage)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_keys_and_recipes_are_those_of_recipe_key(job: Job, storage: Storage) -> None:
    job.samples[1] = replace(job.samples[1], controls=(*job.samples[1].controls, *job.samples[2].controls))
    job.samples[2] = replace(job.samples[2], controls=(), prompt="", size=(32, 96))
    maker = maker_of(job, storage)
    table = KeyTable.of(maker.row(sample) for sample in job.samples)
    manifest = Manifest.of_table(table, "toy")
    for sample in job.samples:
        keys = manifest.samples[sample.name]
        for artifact in job.family.artifacts(sample, job.sizes):
            identity = None if artifact.encoder is None else maker.identities[artifact.encoder]
            stored_as = storage_field(artifact.name, storage, keys["empty_prompt_embeds"])
            recipe = artifact_recipe(artifact, "toy", identity, maker.digests, stored_as)
            assert keys[artifact.name] == recipe_key(recipe)
            assert manifest.recipes[keys[artifact.name]] == recipe
    assert Manifest(manifest.samples, manifest.recipes, "toy") == manifest


def test_the_storage_form_is_part_of_the_key_and_the_native_one_is_not(job: Job) -> None:
    index = ContentIndex(job.folder / "index.json")
    artifact = job.family.artifacts(job.samples[0], job.sizes)[2]
    native = artifact_recipe(artifact, "toy", None, index)
    assert "storage" not in native
    assert artifact_recipe(artifact, "toy", None, index, {"dtype": "float16"}) == {
        **native,
        "storage": {"dtype": "float16"},
    }
    rows = [maker_of(job, storage).row(job.samples[0]).keys for storage in STORAGES]
    prompt_embeds = [row[2 * 16 : 3 * 16] for row in rows]
    assert len(set(prompt_embeds)) == len(STORAGES)
    assert len({row[:16] for row in rows}) == 2  # image latents: float16 alone concerns them


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_taking_and_joining_tables_is_taking_and_joining_samples(data: st.DataObject) -> None:
    digests = st.integers(0, 5).map(lambda number: f"{number:032x}")

    def table(names: list[str]) -> tuple[KeyTable, dict[str, dict[str, str]]]:
        samples = {
            name: data.draw(st.dictionaries(st.sampled_from("abc"), digests, max_size=3), label=name) for name in names
        }
        recipes = {
            key: {"artifact": artifact, "inputs": [{"role": "r", "content": f"file:{key}"}]}
            for keys in samples.values()
            for artifact, key in keys.items()
        }
        return KeyTable.from_mappings(samples, recipes), samples

    first, first_samples = table(["p", "q", "r"])
    second, second_samples = table(["s", "t"])
    both = first.joined(second)
    order = data.draw(st.lists(st.integers(0, 4), unique=True))
    taken = both.take(np.array(order, np.int64))
    wanted = {**first_samples, **second_samples}
    names = ["p", "q", "r", "s", "t"]
    assert taken.names == [names[number] for number in order]
    for row, name in enumerate(taken.names):
        source = first if name in first_samples else second
        assert taken.keys_of(row) == wanted[name]
        for number in range(len(wanted[name])):
            assert taken.recipe(row, number) == source.recipe(source.row_of[name], number)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 255]), st.sampled_from([0, 1, 255]))),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_an_index_finds_what_is_there_also_where_halves_are_alike(
    pairs: list[tuple[int, int]], first: int, second: int
) -> None:
    listed = [bytes([a] * 8 + [b] * 8) for a, b in pairs]
    index = KeyIndex(np.frombuffer(b"".join(listed), np.uint8).reshape(-1, 16))
    assert list(index) == sorted({key.hex() for key in listed})
    assert [index.keys[number].tobytes() for number in index.distinct_of] == listed
    wanted = bytes([first] * 8 + [second] * 8)
    assert index.position(wanted) == (listed.index(wanted) if wanted in listed else None)
    every = [bytes([a] * 8 + [b] * 8) for a in (0, 1, 7, 255) for b in (0, 1, 7, 255)]
    found = index.contains(np.frombuffer(b"".join(every), np.uint8).reshape(-1, 16))
    assert found.tolist() == [key in listed for key in every]
