"""Samples come back as they were encoded, in order, and what is held is never overwritten."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.embeddings.toy_family import Job

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.buffers import Buffers, carve
from dittocache.embeddings.reading.read_ahead import BATCHES_AHEAD, SAMPLES_AHEAD, THREAD_NAME
from dittocache.embeddings.reading.reader import CachedBatches, CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError, RecordCorruptError, RecordMissingError
from dittocache.families.base import Tensors


@pytest.fixture
def reader(job: Job) -> CachedSamples:
    job.cache()
    assert job.previous is not None
    return CachedSamples(job.store, job.previous)


def record_file(job: Job, name: str, artifact: str) -> Path:
    assert job.previous is not None
    key = job.previous.samples[name][artifact]
    return job.store.root / "objects" / key[:2] / f"{key}.safetensors"


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def threads_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def test_a_sample_is_loaded_as_it_was_encoded(job: Job, reader: CachedSamples) -> None:
    expected = job.expected()
    for name in reader.names:
        assert same(reader.load(name), expected[name])
        assert torch.equal(reader.artifact(name, "img_shapes"), expected[name]["img_shapes"])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_prefetched_batches_are_the_loaded_ones_in_order(job: Job, reader: CachedSamples, threads: int) -> None:
    batches = [[job.samples[(7 * step + one) % 6].name for one in range(3)] for step in range(12)]
    expected = job.expected()
    count = 0
    for names, batch in zip(batches, reader.prefetch(iter(batches), threads), strict=True):
        assert all(same(tensors, expected[name]) for name, tensors in zip(names, batch, strict=True))
        count += 1
    assert count == 12


def test_what_is_held_stays_while_its_neighbours_are_read_over(job: Job, reader: CachedSamples) -> None:
    """One tensor, or a view of one, keeps its batch's memory from being used again; the rest of it is used again."""
    expected = job.expected()
    batches = [[sample.name] for sample in job.samples] * 5
    held: list[tuple[str, str, torch.Tensor]] = []
    for [name], [tensors] in zip(batches, reader.prefetch(batches), strict=True):
        held.append((name, "image_latents", tensors["image_latents"][2:]))
        held.append((name, "prompt_embeds_mask", tensors["prompt_embeds_mask"]))
        del tensors
    for name, artifact, tensor in held:
        full = expected[name][artifact]
        assert torch.equal(tensor, full[2:] if artifact == "image_latents" else full)


def test_memory_that_nothing_holds_is_used_again(job: Job, reader: CachedSamples) -> None:
    batches = [[sample.name] for sample in job.samples] * 10
    places = set()
    for [tensors] in reader.prefetch(batches, threads=1):
        places.add(min(tensor.data_ptr() for tensor in tensors.values()))
        del tensors
    assert len(places) <= BATCHES_AHEAD + SAMPLES_AHEAD + 2


def test_a_buffer_is_given_out_again_only_when_its_last_view_is_gone() -> None:
    buffers = Buffers(pin=False)
    first, second = carve(buffers, [(torch.bfloat16, (3, 5)), (torch.bool, (7,))])
    place = first.data_ptr()
    view = memoryview(second.numpy()).cast("B")[2:]
    del first, second
    [other] = carve(buffers, [(torch.float32, (4,))])
    assert other.data_ptr() != place
    del view
    [again] = carve(buffers, [(torch.float32, (4,))])
    assert again.data_ptr() == place


def test_buffers_that_are_too_small_are_left_and_few_are_kept() -> None:
    buffers = Buffers(pin=False, keep=2)
    small = carve(buffers, [(torch.uint8, (10,))])
    place = small[0].data_ptr()
    del small
    large = carve(buffers, [(torch.uint8, (5 << 20,))])
    assert large[0].data_ptr() != place
    many = [carve(buffers, [(torch.uint8, (5 << 20,))]) for _ in range(4)]
    del large, many
    assert len(buffers._free) == 2


def test_what_is_loaded_may_be_changed_without_changing_the_store(job: Job, reader: CachedSamples) -> None:
    reader.load("sample-00")["image_latents"].zero_()
    assert same(reader.load("sample-00"), job.expected()["sample-00"])
    for [tensors] in reader.prefetch([["sample-00"]] * 8):
        assert same(tensors, job.expected()["sample-00"])
        tensors["image_latents"].zero_()


def test_a_bounded_number_of_batches_is_read_ahead_and_reading_stops_when_closed(reader: CachedSamples) -> None:
    taken = 0

    def endless() -> Iterator[list[str]]:
        nonlocal taken
        while True:
            taken += 1
            yield ["sample-00"]

    stream = reader.prefetch(endless(), threads=3)
    next(stream)
    next(stream)
    assert taken == SAMPLES_AHEAD * 3 + 2
    stream.close()  # type: ignore[attr-defined]
    assert not threads_alive()


def test_no_thread_is_left_when_the_batches_end_or_fail(reader: CachedSamples) -> None:
    def failing() -> Iterator[list[str]]:
        yield ["sample-00"]
        raise KeyboardInterrupt

    assert len(list(reader.prefetch([["sample-00"]] * 3))) == 3
    assert not threads_alive()
    with pytest.raises(KeyboardInterrupt):
        list(reader.prefetch(failing()))
    assert not threads_alive()


def test_the_pictures_are_not_needed_to_read(job: Job, reader: CachedSamples) -> None:
    expected = job.expected()
    shutil.rmtree(job.folder / "set")
    shutil.rmtree(job.folder / "model")
    [batch] = reader.prefetch([reader.names])
    assert all(same(tensors, expected[name]) for name, tensors in zip(reader.names, batch, strict=True))


def test_an_error_comes_where_its_batch_would_have_come(job: Job, reader: CachedSamples) -> None:
    path = record_file(job, "sample-02", "image_latents")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stream = reader.prefetch([[name] for name in reader.names])
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RecordCorruptError, match="sample 'sample-02', image_latents"):
        next(stream)
    assert not threads_alive()


def test_a_record_that_is_gone_is_an_error_that_names_its_sample(job: Job, reader: CachedSamples) -> None:
    reader.load("sample-01")
    record_file(job, "sample-01", "prompt_embeds").unlink()
    with pytest.raises(RecordMissingError, match="sample 'sample-01', prompt_embeds: record"):
        list(reader.prefetch([["sample-00"], ["sample-01"]]))


def test_a_sample_that_is_not_there_is_named(tmp_path: Path) -> None:
    reader = CachedSamples(Store(tmp_path), Manifest({"a": {"image_latents": "0" * 32}}))
    with pytest.raises(RecordMissingError, match="sample 'a', image_latents: record 0000"):
        reader.load("a")
    with pytest.raises(DataError, match="no sample 'b' among the 1"):
        reader.load("b")
    with pytest.raises(DataError, match="no sample 'b' among the 1"):
        list(reader.prefetch([["b"]]))
    with pytest.raises(DataError, match="no artifact 'mask'; it has image_latents"):
        reader.artifact("a", "mask")


def test_a_reader_can_be_pickled(job: Job, reader: CachedSamples) -> None:
    reader.load("sample-03")
    again = pickle.loads(pickle.dumps(reader))
    assert same(again.load("sample-03"), job.expected()["sample-03"])
    batches = CachedBatches(job.store, reader._manifest, pin=False)
    assert type(pickle.loads(pickle.dumps(batches))) is CachedBatches
