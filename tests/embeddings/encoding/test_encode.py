"""Encoding what is missing: once each, in batches that fit, whatever a single sample does."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.embeddings.toy_family import Job, ToyFamily, ToyPipeline, make_job, picture

from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, ModelError, RecordMissingError, StoreUnavailableError
from dittocache.events import read_events


def assert_all_cached(job: Job) -> None:
    plan = job.plan()
    assert plan.misses == 0
    reader = CachedSamples(job.store, plan.manifest)
    for name, expected in job.expected().items():
        loaded = reader.load(name)
        assert loaded.keys() == expected.keys()
        for artifact, tensor in expected.items():
            assert loaded[artifact].dtype == tensor.dtype
            assert torch.equal(loaded[artifact], tensor), (name, artifact)


def test_cached_tensors_are_those_of_the_encoder_bit_for_bit(job: Job) -> None:
    result = job.cache()
    assert (result.encoded, result.reused, result.failed) == (6 * 7, 0, {})
    assert result.bytes_written == job.plan().bytes_stored == sum(map(job.store.bytes_of, job.store.keys()))
    assert_all_cached(job)


def test_a_second_run_encodes_nothing_and_loads_no_encoder(job: Job) -> None:
    job.cache()
    before = job.family.log.read_bytes()
    result = job.cache()
    assert (result.encoded, result.reused, result.bytes_written) == (0, 42, 0)
    assert job.family.log.read_bytes() == before


def test_one_encoder_in_memory_at_a_time_with_what_it_needs_beside_it(job: Job) -> None:
    job.cache()
    assert job.family.logged("load") == [["vae"], ["text_encoder", "tokenizer"]]
    order = [encoder for encoder, _ in job.family.logged("encode")]
    assert order == ["vae"] * 6 + ["text_encoder"] * 6 + [None] * 6


def test_an_encoder_is_gone_from_memory_before_the_next_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, count=1)
    load = ToyFamily.load_pipeline
    loaded: list[weakref.ref[ToyPipeline]] = []

    def watched(self: ToyFamily, model: str, components: Collection[str], *where: Any) -> ToyPipeline:
        assert [reference() for reference in loaded] == [None] * len(loaded)
        pipe = load(self, model, components, *where)
        pipe.weights["itself"] = pipe  # type: ignore[assignment]  # a cycle, as modules with hooks have
        loaded.append(weakref.ref(pipe))
        return pipe

    monkeypatch.setattr(ToyFamily, "load_pipeline", watched)
    job.cache()
    assert len(loaded) == 2


def test_what_samples_share_is_encoded_once(job: Job) -> None:
    for place, name in ((1, "twin"), (7, "later twin")):  # in the same batch and in another one
        target = picture(job.folder / f"set/{name}.bmp", name)
        job.samples.insert(place, replace(job.samples[0], name=name, target=target))
    assert job.plan().as_dict()["to_encode"] == {"vae": 8, "text_encoder": 6, "none": 6}
    job.cache()
    text = [name for encoder, name in job.family.logged("encode") if encoder == "text_encoder"]
    assert text == [f"sample-{number:02d}" for number in range(6)]
    assert_all_cached(job)


def test_memory_that_runs_out_halves_the_batch_and_goes_on(job: Job) -> None:
    job.memory, job.batch_size = 1, 5
    assert job.cache().encoded == 42
    assert_all_cached(job)
    texts = [event["text"] for event in read_events(job.folder / "events.jsonl") if event["kind"] == "message"]
    assert "memory ran out; going on with batches of 2" in texts
    assert "memory ran out; going on with batches of 1" in texts


def test_a_sample_too_large_for_memory_alone_is_an_error_that_names_it(job: Job) -> None:
    job.memory = 0
    with pytest.raises(CacheError, match="'sample-00' alone"):
        job.cache()


@pytest.mark.parametrize("kind", ["truncated", "no picture"])
def test_a_bad_image_is_named_at_the_end_and_loses_no_other(job: Job, kind: str) -> None:
    bad = job.samples[2].target
    bad.write_bytes(bad.read_bytes()[:-60] if kind == "truncated" else b"not a picture")
    plan = job.plan()
    result = job.encode(plan)
    assert list(result.failed) == [str(bad)]
    assert str(bad) in result.failed[str(bad)]
    assert result.failed_samples == ["sample-02"]
    last = list(read_events(job.folder / "events.jsonl"))[-1]
    assert last["level"] == "error" and str(bad) in last["text"]
    reader = CachedSamples(job.store, plan.manifest.without(result.failed_samples))
    assert reader.names == [sample.name for sample in job.samples if sample.name != "sample-02"]
    for name in reader.names:
        reader.load(name)
    with pytest.raises(RecordMissingError, match="sample 'sample-02'"):
        CachedSamples(job.store, plan.manifest).load("sample-02")


def test_what_a_failed_sample_shares_is_encoded_for_the_others(job: Job) -> None:
    bad = job.samples[0]
    twin = replace(bad, name="twin", target=picture(job.folder / "set/twin.bmp", "twin"))
    job.samples.append(twin)
    bad.target.write_bytes(b"not a picture")
    plan = job.plan()
    result = job.encode(plan)
    assert result.failed_samples == ["sample-00"]
    CachedSamples(job.store, plan.manifest).load("twin")


def test_a_picture_that_changes_while_it_is_cached_is_not_stored_under_the_old_key(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job.plan()
    changed = job.samples[3]
    picture(changed.target, "another")
    result = job.encode(plan)
    assert result.failed == {str(changed.target): "it changed while it was being cached; start again"}
    assert plan.manifest.samples["sample-03"]["image_latents"] not in job.store
    job.cache()
    assert_all_cached(job)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_once_the_batch_in_flight_is_stored(
    job: Job, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    encode = ToyFamily.encode

    def interrupted(self: ToyFamily, pipe, encoder, samples, sizes, **options):  # type: ignore[no-untyped-def]
        signal.raise_signal(number)
        return encode(self, pipe, encoder, samples, sizes, **options)

    monkeypatch.setattr(ToyFamily, "encode", interrupted)
    handler = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            job.cache()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, handler)
    assert len(set(job.store.keys())) == 4  # two samples, two records each
    monkeypatch.undo()
    job.cache()
    vae = [name for encoder, name in job.family.logged("encode") if encoder == "vae"]
    assert sorted(vae) == [sample.name for sample in job.samples]


def test_progress_counts_this_runs_samples_with_speed_and_eta(job: Job) -> None:
    job.seconds = 0.01
    job.cache()
    progress = [event for event in read_events(job.folder / "events.jsonl") if event["kind"] == "progress"]
    assert [event["total"] for event in progress if event["done"] == event["total"]] == [6, 6, 6]
    assert all(event["eta"] == 0 and event["speed"] > 0 for event in progress if event["done"] == event["total"])
    assert progress[0]["speed"] < 100


def test_a_full_disk_ends_the_run_and_keeps_what_is_stored(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many = Store.write_many
    left = iter(range(2))  # batches of two samples with two records each

    def full(self: Store, *records: object, **options: object) -> list[int]:
        if next(left, None) is None:
            raise StoreUnavailableError("the disk is full")
        return write_many(self, *records, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "write_many", full)
    with pytest.raises(StoreUnavailableError):
        job.cache()
    monkeypatch.undo()
    assert job.plan().hits == 8
    job.cache()
    assert_all_cached(job)


def test_a_plan_for_something_else_is_refused(job: Job) -> None:
    plan = job.plan()
    with pytest.raises(CacheError, match="plan again"):
        replace(job, dtype=torch.float32).encode(plan)
    with pytest.raises(ModelError, match="no encoder 'text_encoder_2'; it has vae, text_encoder"):
        job.encode(plan, ["text_encoder_2"])


def test_nothing_is_left_beside_the_records(job: Job) -> None:
    job.cache()
    files = {path.relative_to(job.folder / "cache") for path in (job.folder / "cache").rglob("*") if path.is_file()}
    records = {path for path in files if path.parts[0] == "objects"}
    assert files - records == {Path("layout.json"), Path("content-index.json")}
    assert {path.suffix for path in records} == {".safetensors"} and len(records) == 42
