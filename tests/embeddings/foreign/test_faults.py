"""Faults injected: killed and racing writers, fuzzed metadata and foreign files."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.embeddings.foreign.grid_family import Job, make_job, write_musubi, write_qflux

from dittocache import CacheError, EmbeddingCacheManager
from dittocache.embeddings.foreign.expectation import expected_of
from dittocache.embeddings.foreign.importing import import_qflux
from dittocache.embeddings.foreign.metadata import read_metadata
from dittocache.embeddings.foreign.musubi import MusubiCache

KILLS = 20
ROUNDS = 10
WRITERS = 8


def hashes(sample: int) -> dict[str, str]:
    return {"main_hash": f"main{sample}", "prompt_hash": "prompt"}


def tensor_of(sample: int) -> torch.Tensor:
    return torch.full((50, 64), float(sample))


def load(manager: EmbeddingCacheManager, sample: int, **options: Any) -> Any:
    return manager.load_cache({"file_hashes": hashes(sample)}, **options)


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_writers_that_race_for_one_name_all_keep_theirs(tmp_path: Path, format: Any) -> None:
    """Whoever comes second finds the name taken, also at the same moment."""
    for turn in range(ROUNDS):
        manager = EmbeddingCacheManager(tmp_path / str(turn), format)

        def save(sample: int, manager: EmbeddingCacheManager = manager) -> None:
            manager.save_cache_embedding(
                {"prompt_embeds": tensor_of(sample)}, {"prompt_embeds": "prompt_hash"}, hashes(sample)
            )

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(save, range(WRITERS)))
        for sample in range(WRITERS):
            assert torch.equal(load(manager, sample)["prompt_embeds"], tensor_of(sample))


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_a_killed_writer_leaves_whole_samples_or_none(tmp_path: Path, format: Any) -> None:
    manager = EmbeddingCacheManager(tmp_path, format)
    tensors = [tensor_of(sample) for sample in range(50)]
    finished = tmp_path / "finished"
    chance = random.Random(7)
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:  # saves until it is killed; says after each sample that it is done
            descriptor = os.open(finished, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for sample, tensor in enumerate(tensors):
                keys = {"prompt_embeds": tensor, "prompt_embeds_mask": tensor[:, 0] >= 0}
                names = {**hashes(sample), "prompt_hash": f"{kill}p{sample}", "main_hash": f"{kill}m{sample}"}
                manager.save_cache_embedding(keys, dict.fromkeys(keys, "prompt_hash"), names)
                os.write(descriptor, f"{kill} {sample}\n".encode())
            os._exit(0)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    done = {tuple(map(int, line.split())) for line in finished.read_text().splitlines()} if finished.exists() else set()
    whole = 0
    for kill in range(KILLS):
        for sample in range(len(tensors)):
            data = manager.load_cache({"file_hashes": {"main_hash": f"{kill}m{sample}"}})  # raises for a torn file
            assert data["cached"] or (kill, sample) not in done
            assert not data["cached"] or torch.equal(data["prompt_embeds"], tensors[sample])
            whole += data["cached"]
    assert len(done) <= whole
    manager.clear_cache()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != finished]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=80),
        st.dictionaries(
            st.sampled_from(["version", "prompt_embeds", "img_shapes", "../x", "metadata"]),
            st.one_of(st.just("2.0"), st.text(max_size=12), st.none(), st.lists(st.lists(st.integers()))),
        ),
    )
)
def test_fuzzed_metadata_is_an_error_of_ours_or_names_in_the_folder(tmp_path: Path, content: Any) -> None:
    import json

    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        found = read_metadata(path)
    except CacheError as error:
        assert "a.json" in str(error)
    else:
        assert all("/" not in name and "." not in name for names in found.stems.items() for name in names)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One sample and its files by musubi-tuner."""
    job = make_job(tmp_path_factory.mktemp("musubi"), count=1)
    write_musubi(job.folder / "musubi", job.samples, job.expected())
    return job


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzzed_musubi_files_are_an_error_of_ours_or_fit(cached: Job, data: st.DataObject) -> None:
    """They carry no checksum: a flipped bit in a tensor cannot be noticed, a torn or odd header must be."""
    [sample], plan = cached.samples, cached.plan()
    expected = expected_of(cached.family, sample, cached.sizes)  # type: ignore[arg-type]
    artifact = data.draw(st.sampled_from(["image_latents", "control_latents", "prompt_embeds"]))
    whole = {path: path.read_bytes() for path in (cached.folder / "musubi").iterdir()}
    path = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[path])
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    recipe = plan.recipe(plan.manifest.samples[sample.name][artifact])
    try:
        cache = MusubiCache(cached.folder / "musubi", cached.family.name, [sample.name])
        found = cache.read(sample, artifact, recipe, expected).tensor
    except CacheError:
        pass
    else:
        assert found.ndim == 2
        assert artifact == "prompt_embeds" or len(found) == expected.tokens(artifact)
    finally:
        for file, original in whole.items():
            file.write_bytes(original)
    assert load_file(path)


def test_records_left_by_a_killed_import_stay(tmp_path: Path) -> None:
    job = make_job(tmp_path, count=12)
    expected = job.expected()
    write_qflux(tmp_path / "qflux", job.samples, expected, dtype=None)
    chance = random.Random(3)
    for _ in range(5):
        plan, store, log = job.plan(), job.store, job.log
        child = os.fork()
        if child == 0:
            import_qflux(tmp_path / "qflux", plan, store, log, family=job.family)
            os._exit(0)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name, artifacts in job.stored().items():  # raises for a torn record
            assert all(torch.equal(artifacts[key], expected[name][key]) for key in artifacts)
    assert not import_qflux(tmp_path / "qflux", job.plan(), job.store, job.log, family=job.family).refused
    assert not job.plan().missed
