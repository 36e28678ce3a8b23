"""Exports: what other tools read, whole or not at all, to be started again, and back without losing a bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.embeddings.foreign.grid_family import Job, make_job
from tests.embeddings.toy_family import picture

from dittocache import EmbeddingCacheManager
from dittocache.embeddings.foreign import embedding_files, export
from dittocache.embeddings.foreign.export import ExportResult, export_cache, plan_export
from dittocache.embeddings.foreign.importing import import_qflux
from dittocache.errors import CacheError, StoreUnavailableError

ARTIFACTS = 7


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return cached(make_job(tmp_path))


def cached(job: Job) -> Job:
    plan, store = job.plan(), job.store
    for name, tensors in job.expected().items():
        for artifact, key in plan.manifest.samples[name].items():
            store.write(key, tensors[artifact], plan.recipe(key))
    return job


def run(job: Job, folder: Path, format: str = "pt", layout: str = "qflux", **options: Any) -> ExportResult:
    manifest = job.plan().manifest
    return export_cache(job.store, manifest, folder, format, layout, job.samples, log=job.log, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["pt", "safetensors"])
@pytest.mark.parametrize("controls", [1, 6])
def test_export_and_import_give_the_same_tensors_bit_for_bit(tmp_path: Path, format: str, controls: int) -> None:
    job = cached(make_job(tmp_path, controls=controls))
    job.samples[1] = replace(job.samples[1], prompt=job.samples[0].prompt)  # and another control: no file in common
    result = run(cached(job), tmp_path / "out", format)
    assert (result.samples, result.files, result.present) == (3, 3 * ARTIFACTS, 0)
    shutil.rmtree(tmp_path / "cache")
    imported = import_qflux(tmp_path / "out", job.plan(), job.store, job.log, family=job.family, check=3)
    assert (imported.imported, imported.refused, imported.notes) == (3 * ARTIFACTS, [], {})
    for name, tensors in job.expected().items():
        stored = job.stored()[name]
        for artifact, tensor in tensors.items():
            assert stored[artifact].dtype == tensor.dtype
            assert torch.equal(stored[artifact], tensor)


def test_qflux_and_the_manager_read_the_export(tmp_path: Path, job: Job) -> None:
    run(job, tmp_path / "out")
    manager = EmbeddingCacheManager(tmp_path / "out")
    for sample in job.samples:
        data = {"image": sample.target, "control": sample.controls[0], "prompt": sample.prompt}
        data = {**data, "file_hashes": manager.get_file_hashes(data)}
        loaded = manager.load_cache(data, replace_empty_embeddings=True)
        expected = job.expected()[sample.name]
        assert loaded["cached"] is True
        assert torch.equal(loaded["prompt_embeds"], expected["empty_prompt_embeds"])
        # And as qflux does: names from the metadata, any pickle.
        main = data["file_hashes"]["main_hash"]  # type: ignore[index]
        metadata = json.loads((tmp_path / f"out/metadata/{main}.json").read_text())
        assert metadata.pop("version") == "2.0"
        for key, name in metadata.items():
            assert torch.equal(torch.load(tmp_path / f"out/{key}/{name}.pt", weights_only=False), expected[key])


def test_flat_files_hold_a_sample_each(tmp_path: Path, job: Job) -> None:
    job.samples[2] = replace(job.samples[2], name="folder/with/sample-2")
    cached(job)
    run(job, tmp_path / "out", "safetensors", "flat")
    run(job, tmp_path / "pt", "pt", "flat")
    for name, tensors in job.expected().items():
        found = load_file(tmp_path / f"out/{name}.safetensors")
        as_pt = torch.load(tmp_path / f"pt/{name}.pt", weights_only=True)
        assert set(found) == set(as_pt) == set(tensors)
        assert all(torch.equal(found[key], tensors[key]) and torch.equal(as_pt[key], tensors[key]) for key in tensors)
        with safe_open(tmp_path / f"out/{name}.safetensors", "pt") as opened:
            assert opened.metadata() == {"sample": name}


@pytest.mark.parametrize(("format", "layout"), [("pt", "qflux"), ("pt", "flat"), ("safetensors", "flat")])
def test_an_interrupted_export_goes_on(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch, format: str, layout: str
) -> None:
    out = tmp_path / "out"
    real, count = embedding_files.replace_file, 0

    def dies(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(embedding_files, "replace_file", dies)
    with pytest.raises(KeyboardInterrupt):
        run(job, out, format, layout)
    planned = plan_export(job.store, job.plan().manifest, out, format, layout, job.samples)  # type: ignore[arg-type]
    result = run(job, out, format, layout)
    assert result.present == planned.present == 1
    assert result.files == planned.files == (3 * ARTIFACTS if layout == "qflux" else 3) - 1
    again = run(job, out, format, layout)
    assert (again.files, again.present) == (0, planned.files + 1)
    assert not list(out.rglob("*.tmp"))


def test_the_plan_says_how_much_before_anything_is_written(tmp_path: Path, job: Job) -> None:
    planned = plan_export(job.store, job.plan().manifest, tmp_path / "out", "pt", "qflux", job.samples)
    assert not (tmp_path / "out").exists()
    assert (planned.files, planned.present) == (3 * ARTIFACTS, 0)
    assert f"21 files, {planned.bytes / 1e6:.1f} MB, to write; 0 are there already" in planned.describe()
    assert "MB are free there" in planned.describe()
    run(job, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.pt"))
    assert abs(written - planned.bytes) < 21 * 3000  # each format has a header of its own
    assert json.loads(json.dumps(planned.as_dict()))["dry_run"] is True


def test_what_samples_share_is_written_once(tmp_path: Path, job: Job) -> None:
    job.samples[1] = replace(job.samples[1], controls=job.samples[0].controls)
    cached(job)
    assert plan_export(job.store, job.plan().manifest, tmp_path / "out", "pt", "qflux", job.samples).files == 20
    assert run(job, tmp_path / "out").files == 20


def test_a_disk_that_is_too_small_is_named_first(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreUnavailableError, match=r"the export needs .* MB, .* has 0\.0 MB free"):
        run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_incomplete_samples_are_left_out_and_named(tmp_path: Path, job: Job) -> None:
    key = job.plan().manifest.samples["sample-1"]["prompt_embeds"]
    [record] = (tmp_path / "cache").rglob(f"{key}*")
    record.unlink()
    result = run(job, tmp_path / "out")
    assert (result.samples, result.left_out) == (2, {"sample-1": "not cached completely"})
    assert "1 samples are left out:\n  sample-1: not cached completely" in result.describe()
    assert len(list((tmp_path / "out/metadata").iterdir())) == 2


def test_what_has_changed_since_it_was_cached_is_left_out(tmp_path: Path) -> None:
    """The layout names tensors by the files as they are: an old tensor would get the new picture's name."""
    job = cached(make_job(tmp_path, count=5, controls=2))
    manifest = job.plan().manifest
    picture(job.samples[0].target, "another")
    picture(job.samples[1].controls[1], "another")
    job.samples[2] = replace(job.samples[2], prompt="another caption")
    job.samples[3] = replace(job.samples[3], controls=job.samples[3].controls[::-1])
    result = export_cache(job.store, manifest, tmp_path / "out", "pt", "qflux", job.samples)
    assert {name: reason.partition(" has changed")[0] for name, reason in result.left_out.items()} == {
        "sample-0": "its picture",
        "sample-1": "its control picture",
        "sample-2": "its caption",
        "sample-3": "its control picture",
    }
    assert result.samples == 1
    assert export_cache(job.store, manifest, tmp_path / "flat", "pt", "flat").samples == 5


def test_an_older_export_is_not_overwritten_unasked(tmp_path: Path, job: Job) -> None:
    run(job, tmp_path / "out", "safetensors", "flat")
    job.samples[0] = replace(job.samples[0], prompt="another caption")
    cached(job)
    with pytest.raises(CacheError, match=r"sample-0\.safetensors holds something else.*choose an empty folder"):
        run(job, tmp_path / "out", "safetensors", "flat")
    run(job, tmp_path / "out", "safetensors", "flat", replace=True)
    found = load_file(tmp_path / "out/sample-0.safetensors")["prompt_embeds"]
    (tmp_path / "out/sample-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(CacheError, match=r"sample-1\.safetensors holds something else"):
        run(job, tmp_path / "out", "safetensors", "flat")
    assert torch.equal(found, job.expected()["sample-0"]["prompt_embeds"])


def test_a_damaged_file_of_an_earlier_export_is_mended(tmp_path: Path, job: Job) -> None:
    run(job, tmp_path / "out")
    file = next((tmp_path / "out/image_latents").iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    run(job, tmp_path / "out")
    assert file.read_bytes() == whole


def test_samples_that_the_layout_cannot_tell_apart(tmp_path: Path) -> None:
    """It names a sample by target, first control and prompt; the second control is not among them."""
    job = make_job(tmp_path, count=1, controls=2)
    [one] = job.samples
    other = picture(tmp_path / "set/control/other.bmp", "other")
    job.samples.append(replace(one, name="sample-1", controls=(one.controls[0], other)))
    with pytest.raises(CacheError, match="samples 'sample-0' and 'sample-1' have the same target"):
        run(cached(job), tmp_path / "out")


def test_what_cannot_be_exported_is_named(tmp_path: Path, job: Job) -> None:
    manifest = job.plan().manifest
    with pytest.raises(CacheError, match=r"3 samples of the manifest are not among the given ones \(sample-0\)"):
        export_cache(job.store, manifest, tmp_path / "out", "pt", "qflux")
    with pytest.raises(CacheError, match="format 'zip' with layout 'flat' is unknown"):
        export_cache(job.store, manifest, tmp_path / "out", "zip")  # type: ignore[arg-type]
    job.samples[0] = replace(job.samples[0], name="../outside")
    with pytest.raises(CacheError, match=r"'\.\./outside' cannot name a file below"):
        run(cached(job), tmp_path / "out", "pt", "flat")
    assert not (tmp_path / "outside.pt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        run(make_and_cache(tmp_path / "other"), tmp_path / "file/out", "pt", "flat")


def make_and_cache(folder: Path) -> Job:
    folder.mkdir()
    return cached(make_job(folder))
