"""An encoder session: work in portions, memory that runs out, pictures from other processes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.embeddings.encoding.test_encode import assert_all_cached
from tests.embeddings.toy_family import Job, ToyFamily, picture

from dittocache.embeddings.encoding.decode import PictureFeed
from dittocache.embeddings.encoding.session import EncoderSession, EncodeSettings
from dittocache.embeddings.planning.rates import Forecast, Rates
from dittocache.embeddings.store.storage import Storage
from dittocache.errors import CacheError, ModelError
from dittocache.events import EventLog, Progress, read_events


def session_of(job: Job, encoder: str | None = "vae", plan: Any = None, **options: Any) -> EncoderSession:
    log = EventLog(job.folder / "events.jsonl", "cache")
    settings = EncodeSettings(job.batch_size, **job.options)
    return EncoderSession(plan or job.plan(), encoder, job.family, "cpu", job.store, log, settings, **options)


def messages(job: Job) -> list[str]:
    return [event["text"] for event in read_events(job.folder / "events.jsonl") if event["kind"] == "message"]


def encoded(job: Job, encoder: str) -> list[str]:
    return [name for one, name in job.family.logged("encode") if one == encoder]


def test_work_comes_in_portions_and_the_encoder_is_loaded_once(job: Job) -> None:
    plan = job.plan()
    needs = plan.work("vae")
    progress = Progress(EventLog(job.folder / "events.jsonl", "cache"), total=6)
    with session_of(job, plan=plan, progress=progress) as session:
        assert job.family.logged("load") == []
        first, second = session.encode(needs[:4]), session.encode(needs[2:])
        assert (first.encoded, first.samples, second.encoded, second.samples) == (8, 4, 4, 2)
        assert len(job.store.sizes({key for need in needs for key in need.keys.values()})) == 12
        assert session.encode(needs).encoded == 0
    assert job.family.logged("load") == [["vae"]]
    assert (progress.done, progress.bytes) == (6, first.bytes_written + second.bytes_written)


def test_an_edited_caption_encodes_the_prompt_and_nothing_else(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.cache()
    job.samples[2] = replace(job.samples[2], prompt="another")
    asked: list[Any] = []
    encode = ToyFamily.encode
    monkeypatch.setattr(
        ToyFamily, "encode", lambda *args, **options: asked.append(options["wanted"]) or encode(*args, **options)
    )
    assert job.encode(job.plan()).encoded == 2
    assert [[set(names) for names in wanted] for wanted in asked] == [[{"prompt_embeds", "prompt_embeds_mask"}]]
    monkeypatch.undo()
    assert_all_cached(job)


def test_batches_hold_one_bucket_where_samples_pass_together(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.samples = [replace(one, size=((64, 64), (32, 96))[number % 2]) for number, one in enumerate(job.samples)]
    job.batching, job.batch_size = "together", 2
    batches: list[list[tuple[int, int]]] = []
    encode = ToyFamily.encode

    def watched(self: ToyFamily, pipe: Any, encoder: Any, samples: Any, *rest: Any, **options: Any) -> Any:
        assert options["together"]
        if encoder == "vae":
            batches.append([sample.size for sample in samples])
        return encode(self, pipe, encoder, samples, *rest, **options)

    monkeypatch.setattr(ToyFamily, "encode", watched)
    job.cache()
    assert [(len(batch), len(set(batch))) for batch in batches] == [(2, 1), (1, 1), (2, 1), (1, 1)]


def test_what_passes_together_has_other_keys(job: Job) -> None:
    job.cache()
    exact = job.plan()
    together = replace(job, batching="together").plan()
    assert (exact.misses, together.misses) == (0, 36)  # all but the plain facts
    assert {miss.cause for miss in together.missed} == {"batching changed (exact -> together)"}


def test_a_picture_too_large_for_memory_is_encoded_in_tiles_and_the_record_says_so(job: Job) -> None:
    job.samples[3] = replace(job.samples[3], size=(640, 640))
    job.samples[5] = replace(job.samples[5], size=(640, 640))
    job.large, job.batch_size = frozenset({"sample-03", "sample-05"}), 4
    plan = job.plan()
    result = job.encode(plan, ["vae"])
    assert (result.encoded, result.failed) == (12, {})
    assert result.tiled == ["sample-03", "sample-05"]
    for name, keys in plan.manifest.samples.items():
        header = job.store.header(keys["image_latents"])
        assert (header.provenance or {}).get("vae_tiling", False) == (name in result.tiled), name
    texts = messages(job)
    assert "memory ran out; going on with batches of 1" in texts
    assert "memory ran out; the VAE takes 'sample-03' and other pictures of its size in tiles" in texts
    assert sum(text.startswith("memory ran out; the VAE takes") for text in texts) == 1
    assert "encoded in tiles, for want of memory: sample-03, sample-05" in texts


def test_a_text_encoder_that_does_not_fit_is_an_error_that_names_sample_and_mends(job: Job) -> None:
    job.large = frozenset({"sample-01"})
    with pytest.raises(CacheError, match="text_encoder encoded sample 'sample-01' alone.*cache.devices.*condition_res"):
        job.encode(job.plan(), ["text_encoder"])
    assert len(set(job.store.keys())) >= 4  # what was in flight is stored: sample-00


def test_memory_is_freed_before_the_next_try(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.memory, job.batch_size = 1, 2
    events: list[str] = []
    monkeypatch.setattr("dittocache.embeddings.encoding.session.free_memory", lambda pipe=None: events.append("freed"))
    encode = ToyFamily.encode
    monkeypatch.setattr(ToyFamily, "encode", lambda *args, **options: events.append("try") or encode(*args, **options))
    job.encode(job.plan(), ["vae"])
    assert events == ["try", "freed", *["try"] * 6, "freed"]


def test_everything_is_encoded_again_and_replaced_on_request(job: Job) -> None:
    job.cache()
    plan = job.plan()
    damaged = plan.manifest.samples["sample-02"]["image_latents"]
    job.store.write(damaged, torch.zeros(3, 64), plan.recipe(damaged), replace=True)
    job.options = {"skip_existing": False}
    result = job.encode(plan)
    assert (result.encoded, result.reused) == (42, 0)
    assert_all_cached(job)


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_give_the_encoder_its_pictures(job: Job, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    started: list[int] = []
    leave = PictureFeed.__exit__
    monkeypatch.setattr(
        PictureFeed, "__exit__", lambda feed, *error: started.append(len(feed.processes)) or leave(feed)
    )
    job.options = {"num_workers": workers}
    bad = job.samples[4].target
    bad.write_bytes(b"no picture")
    result = job.encode(job.plan())
    assert list(result.failed) == [str(bad)] and result.failed_samples == ["sample-04"]
    assert started == [workers, 0, 0]  # the VAE has twelve pictures to see, the text encoder only six
    assert result.encoded == 6 * 4 + 5 * 2 + 6
    assert "died" not in result.failed[str(bad)]
    job.samples[4] = replace(job.samples[4], target=picture(bad, "mended"))
    job.cache()
    assert_all_cached(job)


def test_rows_are_shared_with_a_base_that_is_there(job: Job) -> None:
    job.storage = Storage(shared_prefix=True)
    job.cache()
    assert_all_cached(job)


def test_the_cost_of_fp8_is_said_at_the_end(job: Job) -> None:
    job.storage = Storage(dtype="fp8")
    job.cache()
    costs = [text for text in messages(job) if "stored as" in text]
    assert [text.split(" stored as fp8 per token: relative RMS 2.")[0] for text in costs] == [
        "empty_prompt_embeds",
        "prompt_embeds",
    ]


def test_an_unknown_encoder_is_refused(job: Job) -> None:
    with pytest.raises(ModelError, match="no encoder 'text_encoder_2'"):
        session_of(job, "text_encoder_2")


def test_the_next_plan_learns_how_long_a_sample_took(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(job.folder / "rates.json")
    load = ToyFamily.load_pipeline

    def slowly(self: ToyFamily, *arguments: Any) -> Any:
        time.sleep(0.4)
        return load(self, *arguments)

    monkeypatch.setattr(ToyFamily, "load_pipeline", slowly)
    job.seconds = 0.01
    plan = replace(job.plan(), forecast=Forecast(rates=rates, classes={"vae": "Vae"}))
    with session_of(job, plan=plan) as session:
        session.encode(plan.work("vae"))
    seconds = rates.seconds_per_sample("Vae", "bfloat16", "cpu", job.sizes.resolution)
    assert seconds is not None and 0.01 <= seconds < (0.4 + 6 * 0.01) / 6, "loading does not count"
