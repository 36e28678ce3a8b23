"""Keys: any change of what determines a tensor gives another key, and nothing else does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.toy_family import Job

from dittocache.data.digests import ContentIndex
from dittocache.embeddings import recipe as recipe_module
from dittocache.embeddings.planning.identity import encoder_identity
from dittocache.embeddings.recipe import artifact_recipe, canonical_json, recipe_key
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Artifact, ArtifactInput

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
RECIPES = st.dictionaries(st.text(max_size=8), JSON, min_size=1, max_size=6)


def reversed_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reversed_dicts(value[name]) for name in reversed(value)}
    return [reversed_dicts(one) for one in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(RECIPES)
def test_the_order_in_which_a_recipe_was_built_is_irrelevant(recipe: dict[str, Any]) -> None:
    assert recipe_key(reversed_dicts(recipe)) == recipe_key(recipe)
    assert recipe_key(json.loads(canonical_json(recipe))) == recipe_key(recipe)
    assert len(recipe_key(recipe)) == 32 and canonical_json(recipe).isascii()


@settings(deadline=None)
@given(RECIPES, st.data())
def test_any_field_that_changes_changes_the_key(recipe: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(recipe)))
    changed = {**recipe, name: data.draw(JSON)}
    same = canonical_json(changed) == canonical_json(recipe)
    assert (recipe_key(changed) == recipe_key(recipe)) is same
    without = {other: value for other, value in recipe.items() if other != name}
    assert recipe_key(without) != recipe_key(recipe)
    assert recipe_key({**recipe, f"{name}'": recipe[name]}) != recipe_key(recipe)


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), min_size=2, max_size=4))
def test_the_order_and_the_borders_of_inputs_matter(texts: list[str]) -> None:
    index = ContentIndex(Path("/nonexistent/index.json"))

    def key(*words: str) -> str:
        inputs = tuple(ArtifactInput("prompt", text=word) for word in words)
        return recipe_key(artifact_recipe(Artifact("prompt_embeds", None, inputs), "toy", None, index))

    assert (key(*texts) == key(*reversed(texts))) is (texts == texts[::-1])
    assert key("".join(texts)) != key(*texts)


def test_a_value_that_json_cannot_hold_exactly_is_refused() -> None:
    for value in (math.nan, math.inf, Path("x"), {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            recipe_key({"transform": value})


def test_the_key_is_the_same_in_every_process_and_version() -> None:
    """Written down once: if this changes, every cache in the world is stale, and SCHEMA must say so."""
    recipe = {"schema": 1, "artifact": "image_latents", "inputs": [{"role": "target", "content": "file:00"}], "é": 1.5}
    assert canonical_json(recipe) == (
        '{"artifact":"image_latents","inputs":[{"content":"file:00","role":"target"}],"schema":1,"\\u00e9":1.5}'
    )
    assert recipe_key(recipe) == "d6a874d15fddda61e9ac0681bcafca75"


def test_a_recipe_says_everything_that_determines_the_tensor(job: Job) -> None:
    index = ContentIndex(job.folder / "index.json")
    identity = encoder_identity(job.model, "text_encoder", ("tokenizer",), torch.bfloat16, index)
    artifact = job.family.artifacts(job.samples[0], job.sizes)[2]
    recipe = artifact_recipe(artifact, "toy", identity, index)
    assert list(recipe) == ["schema", "artifact", "family", "encoder", "inputs", "transform", "libraries"]
    assert [one["role"] for one in recipe["inputs"]] == ["control", "prompt"]
    assert recipe["inputs"][0]["content"] == f"file:{index.digest(job.samples[0].controls[0])}"
    assert recipe["transform"] == {"area": 32**2, "template": "Describe: {}"}
    assert set(recipe["libraries"]) == {"diffusers", "transformers"}
    assert all(version.count(".") == 1 for version in recipe["libraries"].values())
    assert identity["dtype"] == "bfloat16" and identity["class"] == ["transformers", "Text"]


def test_transformers_counts_only_where_its_code_takes_part(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ContentIndex(job.folder / "index.json")
    artifacts = {one.name: one for one in job.family.artifacts(job.samples[0], job.sizes)}
    vae = encoder_identity(job.model, "vae", (), torch.bfloat16, index)
    text = encoder_identity(job.model, "text_encoder", ("tokenizer",), torch.bfloat16, index)

    def keys() -> list[str]:
        recipes = [
            artifact_recipe(artifacts["image_latents"], "toy", vae, index),
            artifact_recipe(artifacts["prompt_embeds"], "toy", text, index),
            artifact_recipe(artifacts["img_shapes"], "toy", None, index),
        ]
        return [recipe_key(recipe) for recipe in recipes]

    before = keys()
    versions = {"diffusers": recipe_module.library_version("diffusers"), "transformers": "6.1"}
    monkeypatch.setattr(recipe_module, "library_version", versions.__getitem__)
    after = keys()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    versions["diffusers"] = "0.99"
    assert not set(keys()) & set(after)


def test_a_patch_release_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "version", {"a": "6.1.9", "b": "6.1.10.dev0"}.__getitem__)
    recipe_module.library_version.cache_clear()
    assert recipe_module.library_version("a") == recipe_module.library_version("b") == "6.1"
    recipe_module.library_version.cache_clear()


def test_an_input_is_a_file_or_a_text(job: Job) -> None:
    index = ContentIndex(job.folder / "index.json")
    for nonsense in (ArtifactInput("prompt"), ArtifactInput("prompt", file=Path("x"), text="x")):
        with pytest.raises(DataError, match="either a file or a text"):
            artifact_recipe(Artifact("a", None, (nonsense,)), "toy", None, index)
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        artifact_recipe(Artifact("a", None, (ArtifactInput("t", file=Path("gone.png")),)), "toy", None, index)


class TestEncoderIdentity:
    def identity(self, job: Job) -> dict[str, Any]:
        index = ContentIndex(job.folder / "index.json")
        return encoder_identity(job.model, "text_encoder", ("tokenizer",), torch.bfloat16, index)

    def test_what_computes_is_told_from_what_does_not(self, job: Job) -> None:
        before = self.identity(job)
        config = job.model / "text_encoder/config.json"
        config.write_text(
            '{"transformers_version": "9", "_name_or_path": "/a/b", "dtype": "float16", "width": 64, "text": {}}'
        )
        nested = self.identity(job)
        config.write_text('{"width": 64, "text": {"dtype": "float32", "transformers_version": "8"}}')
        assert self.identity(job) == nested
        config.write_text('{"width": 65}')
        assert self.identity(job)["config"] != before["config"]
        (job.model / "text_encoder/README.md").write_text("words")
        assert self.identity(job)["weights"] == before["weights"]

    def test_weights_and_tokenizer_are_known_by_content(self, job: Job) -> None:
        before = self.identity(job)
        renamed = job.model.rename(job.folder / "elsewhere")
        renamed.rename(job.model)
        assert self.identity(job) == before
        (job.model / "text_encoder/model.safetensors").write_bytes(b"weights of tuned_encoder")
        (job.model / "tokenizer/tokenizer.json").write_text("[]")
        after = self.identity(job)
        assert {name for name in before if before[name] != after[name]} == {"weights", "beside"}

    def test_weights_are_read_once(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = job.model / "text_encoder/model.safetensors"
        read: list[str] = []
        from dittocache.data import digests

        real = digests.hash_file
        monkeypatch.setattr(digests, "hash_file", lambda file: read.append(file.name) or real(file))
        monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**9))  # files as if they had been written long ago
        for _ in range(3):
            index = ContentIndex(job.folder / "index.json")
            encoder_identity(job.model, "text_encoder", ("tokenizer",), torch.bfloat16, index)
            index.save()
        assert read.count(weights.name) == 1

    def test_quantization_is_part_of_it(self, job: Job) -> None:
        assert self.identity(job)["quantization"] is None
        (job.model / "text_encoder/config.json").write_text('{"quantization_config": {"bits": 4}}')
        assert self.identity(job)["quantization"] == {"bits": 4}

    @pytest.mark.parametrize(
        ("path", "content", "words"),
        [
            ("model_index.json", None, "expected the folder of a diffusers checkpoint"),
            ("model_index.json", "[]", "no JSON object"),
            ("model_index.json", "{}", "names no component 'text_encoder'"),
            ("text_encoder/config.json", "{", "cannot be read"),
            ("text_encoder/model.safetensors", None, "holds no weights"),
            ("tokenizer/tokenizer.json", None, "no file of a tokenizer"),
            ("text_encoder/m.safetensors.index.json", '{"weight_map": {"a": "shard-2.safetensors"}}', "lacks shard-2"),
        ],
    )
    def test_an_incomplete_checkpoint_is_named(self, job: Job, path: str, content: str | None, words: str) -> None:
        if content is None:
            (job.model / path).unlink()
        else:
            (job.model / path).write_text(content)
        with pytest.raises(ModelError, match=words):
            self.identity(job)

    def test_a_model_that_is_not_here_is_not_downloaded(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        index = ContentIndex(job.folder / "index.json")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(job.folder / "hub"))
        with pytest.raises(ModelError, match="hf download nobody/no-model"):
            encoder_identity("nobody/no-model", "vae", (), torch.float32, index)
        with pytest.raises(ModelError, match="no folder '/no/such/folder'"):
            encoder_identity("/no/such/folder", "vae", (), torch.float32, index)

    def test_a_model_in_the_hubs_local_cache_is_found(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        index = ContentIndex(job.folder / "index.json")
        expected = encoder_identity(job.model, "vae", (), torch.float32, index)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(job.folder / "hub"))
        repository = job.folder / "hub/models--somebody--a-model"
        (repository / "refs").mkdir(parents=True)
        (repository / "snapshots").mkdir()
        (repository / "refs/main").write_text("0" * 40)
        job.model.rename(repository / "snapshots" / ("0" * 40))
        assert encoder_identity("somebody/a-model", "vae", (), torch.float32, index) == expected
