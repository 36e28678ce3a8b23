"""Sources: cached equals live bit for bit, and a partial cache falls back and says so once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError, RecordCorruptError, RecordMissingError
from dittocache.families.base import Tensors
from dittocache.training.sources import CachedSource, LiveSource, MixedSource, with_empty_prompts

BATCHES = [["s0", "s1"], ["s2", "s3"], ["s1"], ["s3", "s0"]]


def _assert_same(one: list[Tensors], two: list[Tensors]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert set(left) == set(right)
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name


def _forbidden() -> LiveSource:
    raise AssertionError("the encoders were loaded though everything is cached")


def test_everything_cached_never_opens_the_encoders(live: LiveSource, reader: Any) -> None:
    notices: list[str] = []
    mixed = MixedSource(CachedSource(reader), _forbidden, notices.append)
    for names, batch in zip(BATCHES, mixed.stream(BATCHES), strict=True):
        _assert_same(batch, live.load(names))
    assert notices == []


@pytest.mark.parametrize("missing", [["s0"], ["s2"], ["s0", "s3"], ["s0", "s1", "s2", "s3"]])
def test_what_is_not_cached_is_encoded_live_and_said_once(live: LiveSource, reader: Any, missing: list[str]) -> None:
    for name in missing:
        del reader.tensors[name]
    notices: list[str] = []
    opened: list[LiveSource] = []
    mixed = MixedSource(CachedSource(reader), lambda: opened.append(live) or live, notices.append)
    batches = list(mixed.stream(BATCHES))
    for names, batch in zip(BATCHES, batches, strict=True):
        _assert_same(batch, live.load(names))
    assert len(notices) == len(opened) == 1
    assert "dittocache cache" in notices[0]
    assert mixed.encoded_live == set(missing)


def test_a_damaged_record_is_encoded_live(live: LiveSource, reader: Any) -> None:
    cached = CachedSource(reader)
    intact = reader.load

    def damaged(name: str) -> Tensors:
        if name == "s1":
            raise RecordCorruptError("checksum differs")
        return intact(name)

    reader.load = damaged
    mixed = MixedSource(cached, lambda: live, lambda _: None)
    _assert_same(mixed.load(["s1"]), live.load(["s1"]))
    assert mixed.bucket("s1") == live.bucket("s1")


def test_a_source_reads_ahead_and_still_falls_back(live: LiveSource, reader: Any) -> None:
    """As a threaded reader does: all batches are taken before the first is given out."""

    class ReadsAhead(CachedSource):
        def stream(self, batches: Any) -> Any:
            for names in list(batches):
                yield self.load(names)

    del reader.tensors["s3"]
    mixed = MixedSource(ReadsAhead(reader), lambda: live, lambda _: None)
    batches = list(mixed.stream(BATCHES))
    for names, batch in zip(BATCHES, batches, strict=True):
        _assert_same(batch, live.load(names))


def test_a_sample_that_the_manifest_does_not_have_is_encoded_live(live: LiveSource, reader: Any) -> None:
    reader.names = ["s0", "s1", "s2"]
    cached = CachedSource(reader)
    reader.load = _not_asked_for("s3", reader.load)
    mixed = MixedSource(cached, lambda: live, lambda _: None)
    for names, batch in zip(BATCHES, mixed.stream(BATCHES), strict=True):
        _assert_same(batch, live.load(names))
    assert mixed.bucket("s3") == live.bucket("s3")
    assert mixed.encoded_live == {"s3"}


def _not_asked_for(unknown: str, load: Any) -> Any:
    def checked(name: str) -> Tensors:
        assert name != unknown, "a reader raises DataError for a sample that it does not know"
        return load(name)

    return checked


def test_other_errors_are_not_taken_for_a_miss(live: LiveSource, reader: Any) -> None:
    reader.load = lambda name: (_ for _ in ()).throw(OSError("disk on fire"))
    mixed = MixedSource(CachedSource(reader), lambda: live, lambda _: None)
    with pytest.raises(OSError, match="disk on fire"):
        mixed.load(["s0"])


def test_the_plain_cached_source_does_not_fall_back(reader: Any) -> None:
    del reader.tensors["s0"]
    with pytest.raises(RecordMissingError):
        CachedSource(reader).load(["s0"])


def test_buckets_are_the_same_cached_and_live(live: LiveSource, reader: Any, samples: list[Sample]) -> None:
    cached = CachedSource(reader)
    for sample in samples:
        width, height = sample.size
        assert cached.bucket(sample.name) == live.bucket(sample.name) == ((1, height // 16, width // 16), (1, 4, 4))


def test_an_unknown_sample_is_an_error(live: LiveSource) -> None:
    with pytest.raises(DataError, match="no sample named 's9'"):
        live.load(["s9"])


def test_dropped_prompts_take_embeddings_and_mask(reader: Any) -> None:
    batch = [reader.load("s2"), reader.load("s3")]
    [dropped, kept] = with_empty_prompts(batch, [True, False])
    assert torch.equal(dropped["prompt_embeds"], batch[0]["empty_prompt_embeds"])
    assert len(dropped["prompt_embeds_mask"]) == len(batch[0]["empty_prompt_embeds_mask"])
    assert len(batch[0]["empty_prompt_embeds_mask"]) < len(batch[0]["prompt_embeds_mask"])
    assert torch.equal(dropped["image_latents"], batch[0]["image_latents"])
    assert kept is batch[1]
    without = [{name: tensor for name, tensor in batch[0].items() if not name.startswith("empty_")}]
    with pytest.raises(DataError, match="caption dropout needs empty prompt embeddings"):
        with_empty_prompts(without, [True])
