"""The same with the real families: what their pipelines compute, as the other tools write it, comes back and agrees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.embeddings.foreign.grid_family import Job, write_musubi, write_qflux

from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.foreign.export import export_cache
from dittocache.embeddings.foreign.importing import import_musubi, import_qflux
from dittocache.errors import CacheError
from dittocache.families.base import Sizes, Tensors
from dittocache.families.registry import get_family


def photograph(path: Path, seed: int, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture(params=["qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "flux"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    save_tiny(tmp_path / "model", request.param)
    edits = "edit" in request.param
    samples = [
        Sample(
            name=f"sample-{number}",
            target=photograph(tmp_path / f"set/images/sample-{number}.png", number, (64, 64)),
            controls=(photograph(tmp_path / f"set/control/{number}.png", 10 + number, (80, 48)),) if edits else (),
            prompt=f"a picture, {number}",
            size=(64, 64),
        )
        for number in range(2)
    ]
    family = get_family(request.param)
    return Job(tmp_path, samples, family, Sizes(64, 64), torch.float32)  # type: ignore[arg-type]


def encoded(job: Job) -> dict[str, Tensors]:
    """What the real encoders make of the samples."""
    tensors: dict[str, Tensors] = {sample.name: {} for sample in job.samples}
    for encoder in (*job.family.encoders, None):
        pipe = None
        if encoder is not None:
            components = [encoder, *job.family.encoders[encoder]]
            pipe = job.family.load_pipeline(str(job.model), components, job.dtype, "cpu")
        for sample, found in zip(job.samples, job.family.encode(pipe, encoder, job.samples, job.sizes), strict=True):
            tensors[sample.name] |= found
    return tensors


def test_qflux(tmp_path: Path, job: Job) -> None:
    tensors = encoded(job)
    write_qflux(tmp_path / "qflux", job.samples, tensors)
    result = import_qflux(tmp_path / "qflux", job.plan(), job.store, job.log, check=1)
    assert not result.refused
    assert not job.plan().missed
    assert 0 < max(one.relative_rms for one in result.compared) < 1e-3  # float16 beside float32
    for name, artifacts in job.stored().items():
        assert all(torch.equal(artifacts[key].float(), tensors[name][key].half().float()) for key in artifacts)
    config = job.model / "vae/config.json"
    fields = json.loads(config.read_text())
    assert 4 * fields.get("z_dim", fields.get("latent_channels")) == 64  # the widths are read from these files


def test_export_and_back(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, encoded(job), dtype=None)
    import_qflux(tmp_path / "qflux", job.plan(), job.store, job.log)
    before = job.stored()
    export_cache(job.store, job.plan().manifest, tmp_path / "out", "pt", "qflux", job.samples)
    (tmp_path / "cache").rename(tmp_path / "old")
    assert not import_qflux(tmp_path / "out", job.plan(), job.store, job.log).refused
    for name, artifacts in job.stored().items():
        assert set(artifacts) == set(before[name])
        assert all(torch.equal(artifacts[key], before[name][key]) for key in artifacts)


def test_musubi(tmp_path: Path, job: Job) -> None:
    tensors = encoded(job)
    write_musubi(tmp_path / "musubi", job.samples, tensors, "qie" if job.samples[0].controls else "qi")
    if job.family.name == "flux":
        with pytest.raises(CacheError, match="cannot be imported for flux"):
            import_musubi(tmp_path / "musubi", job.plan(), job.store, job.log)
        return
    result = import_musubi(tmp_path / "musubi", job.plan(), job.store, job.log, check=2)
    edits = bool(job.samples[0].controls)
    assert len(result.compared) == (8 if edits else 6)
    assert max(one.relative_rms for one in result.compared) < 1e-5
    for name, artifacts in job.stored().items():
        names = {"image_latents", "prompt_embeds", "prompt_embeds_mask", "img_shapes"}
        assert set(artifacts) == names | ({"control_latents"} if edits else set())
        assert all(torch.equal(artifacts[key], tensors[name][key]) for key in artifacts)


def test_check_notices_another_prompt_template(tmp_path: Path, job: Job) -> None:
    """What the files cannot tell: here the words that the other tool put around the prompt."""
    samples = job.samples
    job.samples = [replace(sample, prompt=f"Describe the picture in detail: {sample.prompt}") for sample in samples]
    tensors = encoded(job)
    job.samples = samples
    write_qflux(tmp_path / "qflux", samples, tensors)
    with pytest.raises(CacheError, match="is not what this model's encoders make of this data set") as error:
        import_qflux(tmp_path / "qflux", job.plan(), job.store, job.log, check=1)
    assert all("prompt_embeds" in problem for problem in error.value.problems)


def test_a_mirrored_sample_is_refused_and_a_loss_mask_is_made_anew(tmp_path: Path, job: Job) -> None:
    mask = photograph(tmp_path / "set/mask.png", 7, (64, 64))
    plain = job.samples[0]
    write_qflux(tmp_path / "qflux", job.samples, encoded(job))
    job.samples = [replace(plain, mask=mask), replace(plain, name="mirrored", flipped=True, mask=mask)]
    result = import_qflux(tmp_path / "qflux", job.plan(), job.store, job.log)
    stored, expected = job.stored(), encoded(job)
    assert {one.sample for one in result.refused} == {"mirrored"}
    assert all("mirrored" in one.reason for one in result.refused)
    for name in (plain.name, "mirrored"):
        for fact in ("img_shapes", "loss_mask"):
            assert torch.equal(stored[name][fact], expected[name][fact])
    assert "image_latents" not in stored["mirrored"]
    assert set(stored[plain.name]) == set(expected[plain.name])
    job_of_one = replace(job, samples=job.samples[:1])
    written = export_cache(job.store, job_of_one.plan().manifest, tmp_path / "out", "pt", "qflux", job_of_one.samples)
    assert written
