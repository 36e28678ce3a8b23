"""Batches: read straight into place, they are what loading, padding and stacking one by one would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.embeddings.reading.records_on_disk import FORMS, path_of, write, write_samples

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.collate import collate
from dittocache.embeddings.reading.reader import CachedBatches, CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, RecordCorruptError
from dittocache.families.base import Tensors


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def sample(seed: int, tokens: int, *, masked: bool = True, controls: int = 1, latents: int = 5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "image_latents": torch.randn(latents, 4, generator=generator).bfloat16(),
        "control_latents": torch.randn(3 * controls, 4, generator=generator).bfloat16(),
        "prompt_embeds": torch.randn(tokens, 8, generator=generator).bfloat16(),
        "pooled_prompt_embeds": torch.randn(6, generator=generator).bfloat16(),
        "img_shapes": torch.full((1 + controls, 3), seed, dtype=torch.int32),
    }
    if masked:
        tensors["prompt_embeds_mask"] = torch.rand(tokens, generator=generator) > 0.3
    return tensors


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    controls=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    masked=st.booleans(),
)
def test_a_batch_is_what_padding_and_stacking_give(
    store: Store, lengths: list[int], controls: list[int], masked: bool
) -> None:
    samples = {
        f"s{index}": sample(index, length, masked=masked, controls=controls[index])
        for index, length in enumerate(lengths)
    }
    reader = CachedBatches(store, write_samples(store, samples), pin=False)
    names = list(samples)
    expected = {artifact: padded([one[artifact] for one in samples.values()]) for artifact in samples["s0"]}
    if not masked:
        expected["prompt_embeds_mask"] = padded([torch.ones(length, dtype=torch.bool) for length in lengths])
    if len(set(controls[: len(lengths)])) > 1:
        for artifact, each in (("control_latents", 3), ("img_shapes", 1)):
            own = [torch.ones(len(one[artifact]), dtype=torch.bool) for one in samples.values()]
            expected[f"{artifact}_mask"] = padded(own)
            assert each * max(controls[: len(lengths)]) <= expected[artifact].shape[1]
    for batch in (
        reader.batch(names),
        *reader.prefetch_batches([names] * 3),  # the second and third are read over the first ones
        collate(names, list(samples.values())),
    ):
        assert set(batch) == set(expected)
        for artifact, tensor in expected.items():
            assert torch.equal(batch[artifact], tensor), artifact
            assert batch[artifact].dtype == tensor.dtype


def test_a_batch_is_read_where_a_longer_one_was(store: Store) -> None:
    samples = {"long": sample(1, 9), "short": sample(2, 2), "middle": sample(3, 5)}
    reader = CachedBatches(store, write_samples(store, samples), pin=False)
    place = reader.batch(["long", "middle"])["image_latents"].data_ptr()
    batch = reader.batch(["short", "middle"])
    assert batch["image_latents"].data_ptr() == place
    assert torch.equal(batch["prompt_embeds"][0, 2:], torch.zeros(3, 8, dtype=torch.bfloat16))
    assert batch["prompt_embeds_mask"][0, 2:].tolist() == [False] * 3


def test_a_mask_that_is_no_bool_becomes_one(store: Store) -> None:
    samples = {"a": sample(1, 3), "b": sample(2, 4)}
    masks = {"a": torch.tensor([1, 0, 1]), "b": torch.tensor([1, 1, 0, 2])}
    for name, tensors in samples.items():
        tensors["prompt_embeds_mask"] = masks[name]
    reader = CachedBatches(store, write_samples(store, samples), pin=False)
    for batch in (reader.batch(["a", "b"]), collate(["a", "b"], list(samples.values()))):
        assert batch["prompt_embeds_mask"].dtype == torch.bool
        assert batch["prompt_embeds_mask"].tolist() == [[True, False, True, False], [True, True, False, True]]


@pytest.mark.parametrize("form", [*FORMS, "rows"])
def test_stored_forms_are_restored_into_their_rows(store: Store, form: str) -> None:
    keys: dict[str, dict[str, str]] = {}
    for index, name in enumerate(("a", "b")):
        empty = torch.randn(4 + index, 8, generator=torch.Generator().manual_seed(index))
        prompt = torch.cat([empty[:3], torch.ones(1 + 2 * index, 8)])
        base = write(store, "empty_prompt_embeds", empty, sample=name)
        storage = {"rows_shared_with": base} if form == "rows" else FORMS[form]
        key = write(store, "prompt_embeds", prompt, storage, sample=name)
        keys[name] = {"prompt_embeds": key, "empty_prompt_embeds": base}
    reader = CachedBatches(store, Manifest(keys), pin=False)
    for batch in (reader.batch(["a", "b"]), *reader.prefetch_batches([["a", "b"]] * 2)):
        for artifact in ("prompt_embeds", "empty_prompt_embeds"):
            expected = padded([store.read(keys[name][artifact]) for name in ("a", "b")])
            assert torch.equal(batch[artifact], expected)


def test_the_base_of_shared_rows_is_read_once_for_each_sample(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.randn(4, 8)
    base = write(store, "empty_prompt_embeds", empty)
    key = write(store, "prompt_embeds", torch.cat([empty, empty[:1]]), {"rows_shared_with": base})
    reader = CachedSamples(store, Manifest({"a": {"prompt_embeds": key, "empty_prompt_embeds": base}}), pin=False)
    list(reader.prefetch([["a"]]))
    opened: list[str] = []
    real = Store.opened
    monkeypatch.setattr(Store, "opened", lambda self, wanted: opened.append(wanted) or real(self, wanted))
    list(reader.prefetch([["a"]]))
    assert opened == [base, key]


@pytest.mark.parametrize("change", ["latents", "dtype", "width", "artifact", "mask"])
def test_samples_that_do_not_go_into_one_batch_are_named(store: Store, change: str) -> None:
    samples = {"one": sample(1, 3), "two": sample(2, 3), "three": sample(3, 3)}
    odd = samples["three"]
    if change == "latents":
        odd["image_latents"] = odd["image_latents"].view(-1)
    elif change == "dtype":
        odd["image_latents"] = odd["image_latents"].float()
    elif change == "width":
        odd["prompt_embeds"] = torch.zeros(3, 9, dtype=torch.bfloat16)
    elif change == "artifact":
        del odd["control_latents"]
    else:
        odd["prompt_embeds_mask"] = torch.ones(5, dtype=torch.bool)
    reader = CachedBatches(store, write_samples(store, samples), pin=False)
    with pytest.raises(DataError, match="'three'"):
        reader.batch(list(samples))
    with pytest.raises(DataError, match="'three'"):
        list(reader.prefetch_batches([list(samples)]))
    with pytest.raises(DataError, match="'three'"):
        collate(list(samples), list(samples.values()))


def test_an_empty_batch_is_an_error(store: Store) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        CachedBatches(store, Manifest({}), pin=False).batch([])


def test_a_damaged_record_is_named_in_a_batch(store: Store) -> None:
    manifest = write_samples(store, {"a": sample(1, 3), "b": sample(2, 3)})
    reader = CachedBatches(store, manifest, pin=False)
    reader.batch(["a", "b"])
    path = path_of(store, manifest.samples["b"]["prompt_embeds"])
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(RecordCorruptError, match="sample 'b', prompt_embeds"):
        list(reader.prefetch_batches([["a", "b"]]))
