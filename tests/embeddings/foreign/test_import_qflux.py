"""Importing what qflux cached: right tensors under the plan's keys, and no file that could be another's."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.embeddings.foreign.grid_family import Job, make_job, write_qflux
from tests.embeddings.foreign.test_pt_files import Program
from tests.embeddings.toy_family import picture

from dittocache.embeddings.foreign.findings import ImportResult
from dittocache.embeddings.foreign.importing import import_qflux, plan_import
from dittocache.embeddings.store.bulk import PackWriter
from dittocache.errors import CacheError
from dittocache.families.base import Sizes

RECORDS = 6  # of a sample, img_shapes aside


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


def run(job: Job, folder: Path, **options: object) -> ImportResult:
    return import_qflux(folder, job.plan(), job.store, job.log, family=job.family, **options)  # type: ignore[arg-type]


def reasons(result: ImportResult) -> set[str]:
    return {one.reason for one in result.refused}


def test_everything_is_imported_and_read_again(tmp_path: Path, job: Job) -> None:
    expected = job.expected()
    write_qflux(tmp_path / "qflux", job.samples, expected)
    result = run(job, tmp_path / "qflux")
    assert (result.imported, result.refused) == (3 * (RECORDS + 1), [])
    assert not job.plan().missed
    for name, tensors in job.stored().items():
        for artifact, tensor in expected[name].items():
            wanted = tensor.half() if tensor.is_floating_point() else tensor
            assert tensors[artifact].dtype == wanted.dtype, artifact
            assert torch.equal(tensors[artifact], wanted), artifact
    assert run(job, tmp_path / "qflux").imported == 0


def test_what_was_not_verified_is_said_everywhere(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    result = run(job, tmp_path / "qflux")
    text = result.describe()
    assert "NOT VERIFIED, and taken on trust:\n  - the weights of the encoders" in text
    assert "stored as float16, as the file has it; the plan's encoders compute in bfloat16" in text
    assert any("WITHOUT VERIFYING: the weights of the encoders" in message for message in job.messages)
    key = job.plan().manifest.samples["sample-0"]["prompt_embeds"]
    provenance = job.store.header(key).provenance
    assert provenance is not None
    assert provenance["imported_from"] == "qflux"
    assert provenance["file"].startswith("prompt_embeds/")
    assert "the weights of the encoders" in provenance["unverified"][0]
    assert json.loads(json.dumps(result.as_dict()))["imported"] == result.imported


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    (next((tmp_path / "qflux/image_latents").iterdir())).unlink()
    dry = run(job, tmp_path / "qflux", dry_run=True)
    assert "20 records" in dry.describe() and "can be imported" in dry.describe()
    assert not list(job.store.keys())
    real = run(job, tmp_path / "qflux")
    assert (real.imported, real.bytes_imported, reasons(real)) == (dry.imported, dry.bytes_imported, reasons(dry))
    monkeypatch.setattr("dittocache.embeddings.foreign.importing.get_family", lambda name: job.family)
    assert plan_import("qflux", tmp_path / "qflux", job.plan(), job.store, job.log).dry_run
    with pytest.raises(CacheError, match="caches of 'kohya' cannot be imported"):
        plan_import("kohya", tmp_path, job.plan(), job.store, job.log)  # type: ignore[arg-type]


def test_a_changed_caption_or_picture_is_not_found(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    job.samples[0] = replace(job.samples[0], prompt="another caption")
    picture(job.samples[1].target, "another picture of the same size")
    result = run(job, tmp_path / "qflux")
    assert {one.sample for one in result.refused} == {"sample-0", "sample-1"}
    assert all(one.absent and "changed since" in one.reason for one in result.refused)
    assert "not in the folder: 12 records" in result.describe()


def test_another_resolution_is_refused(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    job.samples = [replace(sample, size=(128, 64)) for sample in job.samples]
    job.sizes = Sizes(128, 32)
    result = run(job, tmp_path / "qflux")
    assert {one.artifact for one in result.refused} == {"image_latents", "control_latents"}
    assert "it has 12 tokens; at this resolution the sample has 32 (4x8): it was cached at another size" in reasons(
        result
    )


def test_a_prompt_that_samples_with_other_controls_share_is_refused(tmp_path: Path, job: Job) -> None:
    """qflux has overwritten the embedding of all but one of them."""
    job.samples[1] = replace(job.samples[1], prompt=job.samples[0].prompt)
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    result = run(job, tmp_path / "qflux")
    assert {one.sample for one in result.refused} == {"sample-0", "sample-1"}
    assert {one.artifact for one in result.refused} >= {"prompt_embeds", "empty_prompt_embeds_mask"}
    [reason] = reasons(result)
    assert "2 different control pictures, which overwrote each other's embedding" in reason


def test_a_prompt_that_samples_with_the_same_control_share_is_imported(tmp_path: Path, job: Job) -> None:
    job.samples[1] = replace(job.samples[1], prompt=job.samples[0].prompt, controls=job.samples[0].controls)
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    assert not run(job, tmp_path / "qflux").refused


def test_a_further_control_that_changed_is_refused(tmp_path: Path) -> None:
    """qflux names the sample by its first control only."""
    job = make_job(tmp_path, count=1, controls=2)
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    assert not run(job, tmp_path / "qflux", dry_run=True).refused
    picture(job.samples[0].controls[1], "another")
    result = run(job, tmp_path / "qflux")
    assert {one.artifact for one in result.refused} == {
        artifact for artifact in job.expected()["sample-0"] if artifact not in ("image_latents", "img_shapes")
    }
    assert reasons(result) == {"a further control picture was added, removed or changed since it was cached"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_refused_alone(tmp_path: Path, job: Job, damage: str) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    file = next((tmp_path / "qflux/prompt_embeds").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes({"truncated": content[:300], "empty": b"", "flipped": content}[damage])
    result = run(job, tmp_path / "qflux")
    assert {one.artifact for one in result.refused} == {"prompt_embeds", "prompt_embeds_mask"}
    assert len({one.sample for one in result.refused}) == 1
    assert all(file.name in one.reason and "torn or damaged" in one.reason for one in result.refused)


def test_a_program_in_a_file_is_refused_and_not_executed(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    torch.save(Program(tmp_path / "executed"), next((tmp_path / "qflux/image_latents").iterdir()))
    result = run(job, tmp_path / "qflux")
    [refusal] = result.refused
    assert "Nothing in it was executed" in refusal.reason
    assert not (tmp_path / "executed").exists()


def test_padding_is_removed_and_masks_become_booleans(tmp_path: Path, job: Job) -> None:
    expected = job.expected()
    padded = {name: dict(tensors) for name, tensors in expected.items()}
    for tensors in padded.values():
        for name in ("prompt_embeds", "prompt_embeds_mask"):
            rows = tensors[name]
            tensors[name] = torch.cat([rows, rows.new_zeros(4, *rows.shape[1:])])
    write_qflux(tmp_path / "qflux", job.samples, padded)
    result = run(job, tmp_path / "qflux")
    assert result.notes["4 tokens of padding removed"] == 6
    stored = job.stored()["sample-0"]
    assert torch.equal(stored["prompt_embeds"], expected["sample-0"]["prompt_embeds"].half())
    assert torch.equal(stored["prompt_embeds_mask"], expected["sample-0"]["prompt_embeds_mask"])


@pytest.mark.parametrize(
    ("artifact", "change", "reason"),
    [
        ("image_latents", lambda tensor: tensor[:, :32], "gives width 64: it is another model's"),
        ("prompt_embeds", lambda tensor: tensor[:, :16], "gives width 32: it is another model's"),
        ("image_latents", lambda tensor: tensor[None], "without a batch axis"),
        ("control_latents", lambda tensor: tensor[:-1], "has 19 tokens; at this resolution the sample has 20 (4x5)"),
        (
            "image_latents",
            lambda tensor: tensor.float().index_fill(0, torch.tensor([2]), 1e9),
            "not finite (torch.float16",
        ),
        (
            "prompt_embeds",
            lambda tensor: tensor.index_fill(1, torch.tensor([2]), torch.nan),
            "not finite (torch.float16",
        ),
        ("image_latents", lambda tensor: [tensor], "it holds a list; expected one tensor"),
        ("prompt_embeds_mask", lambda mask: mask[:-1], "the mask has shape"),
        (
            "prompt_embeds_mask",
            lambda mask: mask.roll(1).index_fill(0, torch.tensor([1]), False),
            "followed by padding",
        ),
        ("prompt_embeds_mask", lambda mask: torch.full(mask.shape, 0.5), "other values than 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, job: Job, artifact: str, change: object, reason: str
) -> None:
    tensors = job.expected()
    write_qflux(tmp_path / "qflux", job.samples, tensors)
    changed = change(tensors["sample-1"][artifact])  # type: ignore[operator]
    file = tmp_path / "qflux" / artifact / f"{_hash_of(tmp_path / 'qflux', job, artifact)}.pt"
    torch.save(changed.half() if isinstance(changed, torch.Tensor) else changed, file)
    result = run(job, tmp_path / "qflux")
    assert result.refused
    assert {one.sample for one in result.refused} == {"sample-1"}
    assert any(reason in one.reason for one in result.refused), reasons(result)


def _hash_of(folder: Path, job: Job, artifact: str) -> str:
    from dittocache.embeddings.foreign.hashing import SourceHashes
    from dittocache.embeddings.foreign.qflux import sample_hashes

    main = sample_hashes(job.samples[1], SourceHashes())["main_hash"]
    return str(json.loads((folder / f"metadata/{main}.json").read_text())[artifact])


def test_a_picture_that_changes_after_the_plan_is_refused(tmp_path: Path, job: Job) -> None:
    plan = job.plan()
    picture(job.samples[0].target, "another")
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    result = import_qflux(tmp_path / "qflux", plan, job.store, job.log, family=job.family)
    assert {one.sample for one in result.refused} == {"sample-0"}
    assert "has changed since the plan was made: plan again" in result.refused[0].reason


def test_check_accepts_what_the_encoders_make_up_to_rounding(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    result = run(job, tmp_path / "qflux", check=2)
    assert len({one.sample for one in result.compared}) == 2
    assert len(result.compared) == 2 * RECORDS
    assert max(one.relative_rms for one in result.compared) < 1e-3
    assert "Compared with the encoders: 12 tensors" in result.describe()


@pytest.mark.parametrize("encoder", ["vae", "text_encoder"])
def test_check_refuses_what_other_weights_made(tmp_path: Path, job: Job, encoder: str) -> None:
    """The fault that no file tells: encoder or its weights changed."""
    weights = job.model / encoder / "model.safetensors"
    ours = weights.read_bytes()
    weights.write_bytes(b"a fine-tuned " + ours)
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    weights.write_bytes(ours)
    with pytest.raises(CacheError, match="nothing was imported.*relative RMS") as error:
        run(job, tmp_path / "qflux", check=1)
    assert len(error.value.problems) == 2
    assert not list(job.store.keys())


def test_check_looks_past_samples_that_have_nothing(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples[1:], job.expected())
    assert {one.sample for one in run(job, tmp_path / "qflux", check=1).compared} == {"sample-1"}


def test_an_interrupted_import_goes_on(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    write, count = PackWriter.write, 0

    def dies(*arguments: object, **options: object) -> int:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PackWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "qflux")
    result = run(job, tmp_path / "qflux")
    assert (result.already_stored, result.imported) == (7, 14)


def test_a_sample_cached_in_part_is_imported_in_part(tmp_path: Path, job: Job) -> None:
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    shutil.rmtree(tmp_path / "qflux/control_latents")
    result = run(job, tmp_path / "qflux")
    assert {one.artifact for one in result.refused} == {"control_latents"}
    assert all(one.absent for one in result.refused)
    assert job.plan().misses == 3


def test_a_folder_that_is_no_cache_is_named(tmp_path: Path, job: Job) -> None:
    with pytest.raises(CacheError, match=r"has no metadata/\*\.json; expected the cache_dir of a qflux run"):
        run(job, tmp_path / "nothing")


def test_source_files_are_read_once(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for sample in job.samples:
        for file in (sample.target, *sample.controls):
            os.utime(file, (1, 1))
    write_qflux(tmp_path / "qflux", job.samples, job.expected())
    read: list[Path] = []
    from dittocache.embeddings.foreign import hashing

    real = hashing._file_digests
    monkeypatch.setattr(hashing, "_file_digests", lambda file: read.append(file) or real(file))
    monkeypatch.setattr(hashing, "GRANULARITY_NS", -(10**18))  # the files are older than a clock's tick
    run(job, tmp_path / "qflux")
    assert len(read) == len(set(read)) == 6
