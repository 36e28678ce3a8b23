"""Importing what musubi-tuner cached: unpacked latents, files named by stems, captions in the metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.embeddings.foreign.grid_family import Job, later, make_job, write_musubi
from tests.embeddings.toy_family import picture

from dittocache.embeddings.foreign.findings import ImportResult
from dittocache.embeddings.foreign.importing import import_musubi
from dittocache.errors import CacheError
from dittocache.families.base import Sizes

IMPORTABLE = ("image_latents", "control_latents", "prompt_embeds", "prompt_embeds_mask")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


def run(job: Job, folder: Path, **options: object) -> ImportResult:
    return import_musubi(folder, job.plan(), job.store, job.log, family=job.family, **options)  # type: ignore[arg-type]


def refused(result: ImportResult) -> dict[str, set[str]]:
    """Reason -> artifacts, of files that are there; the empty prompt never is."""
    found: dict[str, set[str]] = {}
    for one in result.refused:
        if not one.artifact.startswith("empty_"):
            found.setdefault(one.reason, set()).add(one.artifact)
    return found


@pytest.mark.parametrize("controls", [1, 3])
def test_latents_are_packed_and_everything_comes_bit_for_bit(tmp_path: Path, controls: int) -> None:
    job = make_job(tmp_path, controls=controls)
    expected = job.expected()
    write_musubi(tmp_path / "musubi", job.samples, expected)
    result = run(job, tmp_path / "musubi", check=2)
    assert result.imported == 3 * (len(IMPORTABLE) + 1)
    assert {one.relative_rms for one in result.compared} == {0.0}
    for name, tensors in job.stored().items():
        assert set(tensors) == {*IMPORTABLE, "img_shapes"}
        for artifact, tensor in tensors.items():
            assert tensor.dtype == expected[name][artifact].dtype
            assert torch.equal(tensor, expected[name][artifact]), artifact


def test_the_empty_prompt_is_left_to_be_encoded(tmp_path: Path, job: Job) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    result = run(job, tmp_path / "musubi")
    assert {one.artifact for one in result.refused} == {"empty_prompt_embeds", "empty_prompt_embeds_mask"}
    assert {one.reason for one in result.refused} == {"musubi-tuner caches no empty prompt"}
    assert job.plan().misses == 6
    assert "NOT VERIFIED, and taken on trust:\n  - the pictures: files are named by stem and size" in result.describe()
    provenance = job.store.header(job.plan().manifest.samples["sample-0"]["image_latents"]).provenance
    assert provenance is not None
    assert provenance["imported_from"] == "musubi-tuner"
    assert provenance["file"] == "sample-0_0008x0008_qie.safetensors"
    assert provenance["notes"] == ["packed from (C, F, H, W)"]


def test_a_changed_caption_is_refused(tmp_path: Path, job: Job) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    job.samples[0] = replace(job.samples[0], prompt="another caption")
    assert refused(run(job, tmp_path / "musubi")) == {
        "the caption has changed since it was cached": {"prompt_embeds", "prompt_embeds_mask"}
    }


def test_another_resolution_is_refused(tmp_path: Path, job: Job) -> None:
    """Also where the number of tokens happens to be the same: 48x64 is not 64x48."""
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    job.samples = [replace(sample, size=(48, 64)) for sample in job.samples]
    [(reason, artifacts)] = refused(run(job, tmp_path / "musubi")).items()
    assert "shape [16, 1, 6, 8]; expected [C, 1, 8, 6] at this resolution: it was cached at another size" in reason
    assert artifacts == {"image_latents"}
    job.sizes = Sizes(128, 32)
    assert any("control_latents" in one for one in refused(run(job, tmp_path / "musubi")).values())


def test_a_picture_replaced_by_one_of_the_same_size_is_refused(tmp_path: Path, job: Job) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    later(picture(job.samples[0].target, "another target"))
    later(picture(job.samples[1].controls[0], "another control"))
    found = refused(run(job, tmp_path / "musubi"))
    assert sorted(map(sorted, found.values())) == [
        ["control_latents", "prompt_embeds", "prompt_embeds_mask"],
        ["image_latents"],
    ]
    assert all("is newer than it, and may be another picture" in reason for reason in found)


def test_another_number_of_controls_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, count=1, controls=2)
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    job.samples = [replace(job.samples[0], controls=job.samples[0].controls[:1])]
    assert refused(run(job, tmp_path / "musubi")) == {
        "it holds 2 of the 1 control latents of the sample": {"control_latents"}
    }


def test_the_order_of_controls_is_that_of_their_numbers(tmp_path: Path) -> None:
    """Names sort as text: control 10 stands before control 2."""
    job = make_job(tmp_path, count=1, controls=11)
    expected = job.expected()
    write_musubi(tmp_path / "musubi", job.samples, expected)
    run(job, tmp_path / "musubi")
    assert torch.equal(job.stored()["sample-0"]["control_latents"], expected["sample-0"]["control_latents"])


def test_pictures_of_one_stem_are_refused(tmp_path: Path, job: Job) -> None:
    """musubi-tuner gives `a/x.png` and `b/x.png` one file."""
    other = replace(job.samples[0], name="more/sample-0", prompt="other words")
    write_musubi(
        tmp_path / "musubi", [*job.samples, other], {**job.expected(), "more/sample-0": job.expected()["sample-1"]}
    )
    job.samples.append(other)
    result = run(job, tmp_path / "musubi")
    found = refused(result)
    assert list(found) == ["several samples are called 'sample-0': musubi-tuner gives them one file"]
    assert {one.sample for one in result.refused if not one.artifact.startswith("empty")} == {
        "sample-0",
        "more/sample-0",
    }


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_refused_alone(tmp_path: Path, job: Job, damage: str) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    file = tmp_path / "musubi/sample-1_0008x0008_qie.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "empty": b"", "text": b"hello, this is no safetensors"}[damage])
    result = run(job, tmp_path / "musubi")
    [(reason, artifacts)] = refused(result).items()
    assert "it is torn or damaged" in reason
    assert artifacts == {"image_latents", "control_latents"}


def test_a_record_that_samples_share_is_found_with_any_of_them(tmp_path: Path, job: Job) -> None:
    """The same picture under two names has one key; the first file of the two is torn."""
    job.samples[1].target.write_bytes(job.samples[0].target.read_bytes())
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    (tmp_path / "musubi/sample-0_0008x0008_qie.safetensors").write_bytes(b"torn")
    result = run(job, tmp_path / "musubi")
    assert refused(result).popitem()[1] == {"control_latents"}
    assert torch.equal(job.stored()["sample-0"]["image_latents"], job.expected()["sample-0"]["image_latents"])


def test_values_that_are_not_finite_are_refused(tmp_path: Path, job: Job) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    file = tmp_path / "musubi/sample-1_qie_te.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[2, 3] = float("inf")
    save_file(tensors, file, {"caption1": job.samples[1].prompt})
    assert refused(run(job, tmp_path / "musubi")).popitem()[1] == {"prompt_embeds"}


def test_another_architecture_is_named(tmp_path: Path, job: Job) -> None:
    write_musubi(tmp_path / "musubi", job.samples, job.expected(), arch="fk")
    with pytest.raises(CacheError, match=r"has no \*_qie\.safetensors; expected the cache_directory of musubi-tuner"):
        run(job, tmp_path / "musubi")
    job.family.name = "flux"
    with pytest.raises(CacheError, match="cannot be imported for flux; they can for qwen-image, qwen-image-edit, "):
        run(job, tmp_path / "musubi")


def test_check_refuses_what_other_weights_made(tmp_path: Path, job: Job) -> None:
    weights = job.model / "vae/model.safetensors"
    ours = weights.read_bytes()
    weights.write_bytes(b"other " + ours)
    write_musubi(tmp_path / "musubi", job.samples, job.expected())
    weights.write_bytes(ours)
    with pytest.raises(CacheError, match="the cache of musubi-tuner is not what this model's encoders make"):
        run(job, tmp_path / "musubi", check=1)
    assert not list(job.store.keys())
