"""The faults found by running public trainers, one test each: ours passes, the habit that causes the fault fails."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.embeddings.faults.systems import CacheSystem, Habit, OurCache, PlainCache, assert_same
from tests.embeddings.toy_family import Job, picture

from dittocache.families.base import Sizes

Make = Callable[[Job], CacheSystem]


def against(*habits: Habit, plain: bool = True) -> pytest.MarkDecorator:
    """Run on ours, on the plain cache, and on the plain cache with the habits, which must fail."""
    systems = [pytest.param(OurCache, id="ours")]
    if plain:
        systems.append(pytest.param(PlainCache, id="plain"))
    systems.append(
        pytest.param(
            lambda job: PlainCache(job, *habits), id=" and ".join(habits), marks=pytest.mark.xfail(strict=True)
        )
    )
    return pytest.mark.parametrize("make", systems)


@against("skips what has a file")
def test_an_edited_caption_is_seen(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    job.samples[0] = replace(job.samples[0], prompt="paint it black")
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
@pytest.mark.parametrize("role", ["target", "control"])
def test_an_image_replaced_by_one_of_the_same_size_is_seen(make: Make, role: str, job: Job) -> None:
    system = make(job)
    system.cache()
    path = job.samples[0].target if role == "target" else job.samples[0].controls[0]
    before = path.stat()
    picture(path, "another picture")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync --times and unpacked archives do
    assert path.stat().st_size == before.st_size
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
def test_another_resolution_is_seen(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    job.sizes = Sizes(128, 64)
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
def test_another_bucket_is_seen(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    job.samples[0] = replace(job.samples[0], size=(96, 48))
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
@pytest.mark.parametrize("encoder", ["vae", "text_encoder"])
def test_other_weights_of_an_encoder_are_seen(make: Make, encoder: str, job: Job) -> None:
    system = make(job)
    system.cache()
    weights = job.model / encoder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
def test_another_dtype_is_seen(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    job.dtype = torch.float32
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
def test_another_prompt_template_is_seen(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    job.template = "Repeat after me: {}"
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("trains on the folder's listing")
def test_a_deleted_sample_is_not_trained_on(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    del job.samples[2]
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("names embeddings after the prompt alone")
def test_the_same_prompt_with_another_control_image_has_its_own_embedding(make: Make, job: Job) -> None:
    job.samples[1] = replace(job.samples[1], prompt=job.samples[0].prompt)
    system = make(job)
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("skips what has a file")
def test_another_order_of_the_controls_is_seen(make: Make, job: Job) -> None:
    second = picture(job.folder / "set/second.bmp", "second")
    job.samples[0] = replace(job.samples[0], controls=(*job.samples[0].controls, second))
    system = make(job)
    system.cache()
    job.samples[0] = replace(job.samples[0], controls=job.samples[0].controls[::-1])
    system.cache()
    assert_same(system.epoch(), job.expected())


@against("trusts every file")
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_does_not_end_the_training(make: Make, kept: int, job: Job) -> None:
    system = make(job)
    system.cache()
    path = system.files()[3]
    path.write_bytes(path.read_bytes()[:kept])
    assert_same(system.epoch(), job.expected())


@against("expects every file")
def test_a_partial_cache_does_not_end_the_training(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    for path in system.files()[::3]:
        path.unlink()
    assert_same(system.epoch(), job.expected())


@against("keeps the prompt's mask")
def test_a_dropped_caption_takes_the_empty_embedding_and_its_mask(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    dropped = job.samples[1].name
    expected = job.expected()
    for artifact in ("prompt_embeds", "prompt_embeds_mask"):
        expected[dropped][artifact] = expected[dropped][f"empty_{artifact}"]
    assert_same(system.epoch(dropped={dropped}), expected)


@against("encodes everything again", plain=False)
def test_an_interrupted_run_goes_on_where_it_stopped(make: Make, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    system = make(job)
    _interrupt_at(monkeypatch, job, 7)
    with pytest.raises(KeyboardInterrupt):
        system.cache()
    monkeypatch.undo()
    done = len(_encoded(job))
    system.cache()
    assert len(_encoded(job)) <= 2 * len(job.samples) + job.batch_size, f"{done} were done before"
    assert_same(system.epoch(), job.expected())


@against("writes under the final name", "skips what has a file", "trusts every file", plain=False)
def test_a_process_that_ends_in_the_middle_of_a_write_leaves_no_torn_file(
    make: Make, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make(job)
    _disk_full_at(monkeypatch, 10)
    with pytest.raises(OSError):
        system.cache()
    monkeypatch.undo()
    system.cache()
    assert_same(system.epoch(), job.expected())


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


@against("unpickles")
def test_a_file_with_code_in_it_is_not_executed(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    sprung = job.folder / "sprung"
    for path in system.files():
        path.write_bytes(pickle.dumps(Trap(sprung)))
    assert_same(system.epoch(), job.expected())
    assert not sprung.exists()


@against("hashes the pictures at each read")
def test_training_on_cached_samples_needs_no_picture(make: Make, job: Job) -> None:
    expected = job.expected()
    system = make(job)
    system.cache()
    for sample in job.samples:
        for path in (sample.target, *sample.controls):
            path.unlink()
    assert_same(system.epoch(), expected)


@against("casts to float16")
def test_every_tensor_keeps_its_dtype(make: Make, job: Job) -> None:
    system = make(job)
    system.cache()
    dtypes = {artifact: tensor.dtype for artifact, tensor in system.epoch()[job.samples[0].name].items()}
    assert dtypes["prompt_embeds"] == torch.bfloat16
    assert dtypes["prompt_embeds_mask"] == torch.bool
    assert dtypes["img_shapes"] == torch.int32


def _encoded(job: Job) -> list[list[Any]]:
    return [one for one in job.family.logged("encode") if one[0] is not None]


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, job: Job, count: int) -> None:
    """Ctrl-C once `count` samples have passed an encoder."""
    encode = type(job.family)._tensors

    def interrupted(family: Any, pipe: Any, encoder: str | None, *rest: Any) -> Any:
        if len(_encoded(job)) >= count:
            raise KeyboardInterrupt
        return encode(family, pipe, encoder, *rest)

    monkeypatch.setattr(type(job.family), "_tensors", interrupted)


def _disk_full_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The `count`-th synced write, or the `count`-th saved file, breaks off after half of its bytes."""
    written = 0
    write, save = os.write, torch.save

    def broken_write(descriptor: int, content: Any) -> int:
        nonlocal written
        if b"dittocache" in bytes(content[:2000]):
            written += 1
            if written == count:
                write(descriptor, content[: len(content) // 2])
                raise OSError(28, "No space left on device")
        return write(descriptor, content)

    def broken_save(tensor: Any, stream: Any) -> None:
        nonlocal written
        written += 1
        save(tensor, stream)
        if written == count:
            stream.truncate(stream.tell() // 2)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", broken_write)
    monkeypatch.setattr(torch, "save", broken_save)
