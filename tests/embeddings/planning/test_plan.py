"""Plans: what is stale and why, and that nothing stale is ever read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.embeddings.encoding.test_encode import assert_all_cached
from tests.embeddings.toy_family import Job, make_job, picture

from dittocache.data import digests
from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.embeddings import recipe as recipe_module
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import make_plan
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.storage import Storage
from dittocache.errors import DataError, RecordCorruptError, StoreUnavailableError
from dittocache.families.base import Sizes

TEXT = {"prompt_embeds", "prompt_embeds_mask"}
EMPTY = {"empty_prompt_embeds", "empty_prompt_embeds_mask"}
EVERY = {"image_latents", "control_latents", "img_shapes", *TEXT, *EMPTY}


def edit_caption(job: Job) -> None:
    job.samples[1] = replace(job.samples[1], prompt="another caption")


def swap_image(job: Job) -> None:
    """Another picture of the same size in pixels and bytes, with the same modification time."""
    target = job.samples[1].target
    before = target.stat()
    picture(target, "another image")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def swap_control(job: Job) -> None:
    picture(job.samples[1].controls[0], "another control")


def add_control(job: Job) -> None:
    further = picture(job.folder / "set/control/further.bmp", "further")
    job.samples[1] = replace(job.samples[1], controls=(*job.samples[1].controls, further))


def change_bucket(job: Job) -> None:
    job.samples[1] = replace(job.samples[1], size=(80, 48))


def change_resolution(job: Job) -> None:
    job.sizes = Sizes(128, 32)


def change_condition_resolution(job: Job) -> None:
    job.sizes = Sizes(64, 48)


def change_dtype(job: Job) -> None:
    job.dtype = torch.float16


def change_weights(job: Job) -> None:
    (job.model / "vae/model.safetensors").write_bytes(b"weights of VAE")


def change_config(job: Job) -> None:
    (job.model / "text_encoder/config.json").write_text('{"width": 128}')


def change_tokenizer(job: Job) -> None:
    (job.model / "tokenizer/tokenizer.json").write_text("[]")


def change_template(job: Job) -> None:
    job.template = "What is {}?"


ONE, ALL = 1, 6
CHANGES: list[tuple[Callable[[Job], None], str, set[str], int]] = [
    (edit_caption, "caption changed", TEXT, ONE),
    (swap_image, "image changed", {"image_latents"}, ONE),
    (swap_control, "control image changed", {"control_latents", "img_shapes", *TEXT, *EMPTY}, ONE),
    (add_control, "number of control images changed (1 -> 2)", EVERY - {"image_latents"}, ONE),
    (change_bucket, "resolution changed", {"image_latents", "img_shapes"}, ONE),
    (change_resolution, "resolution changed", {"control_latents"}, ALL),
    (change_condition_resolution, "resolution changed", TEXT | EMPTY, ALL),
    (change_dtype, "dtype changed (bfloat16 -> float16)", EVERY - {"img_shapes"}, ALL),
    (change_weights, "encoder weights changed", {"image_latents", "control_latents"}, ALL),
    (change_config, "encoder config changed", TEXT | EMPTY, ALL),
    (change_tokenizer, "tokenizer changed", TEXT | EMPTY, ALL),
    (change_template, "prompt template changed", TEXT | EMPTY, ALL),
]


@pytest.mark.parametrize(
    ("change", "cause", "artifacts", "samples"), CHANGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_changes_makes_stale_what_depends_on_it_and_nothing_else(
    job: Job, change: Callable[[Job], None], cause: str, artifacts: set[str], samples: int
) -> None:
    job.cache()
    change(job)
    plan = job.plan()
    assert {miss.cause for miss in plan.missed} == {cause}
    assert {miss.artifact for miss in plan.stale} == artifacts
    assert len(plan.stale) == plan.misses == samples * len(artifacts)
    assert (plan.hits, plan.orphans) == (42 - plan.misses, plan.misses)
    assert f"{plan.misses} stale: {cause}" in plan.describe()
    assert plan.as_dict()["causes"] == {f"stale: {cause}": plan.misses}
    assert job.cache().encoded == plan.misses
    assert_all_cached(job)


def test_the_order_of_controls_matters(job: Job) -> None:
    first, second = job.samples[0].controls[0], job.samples[1].controls[0]
    job.samples[0] = replace(job.samples[0], controls=(first, second))
    job.cache()
    job.samples[0] = replace(job.samples[0], controls=(second, first))
    plan = job.plan()
    assert {miss.cause for miss in plan.stale} == {"order of control images changed"}
    job.cache()
    assert_all_cached(job)


def test_library_versions_are_a_cause(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.cache()
    versions = {"diffusers": "0.99", "transformers": recipe_module.library_version("transformers")}
    monkeypatch.setattr(recipe_module, "library_version", versions.__getitem__)
    [cause] = {miss.cause for miss in job.plan().stale}
    assert cause.startswith("diffusers version changed (") and cause.endswith(" -> 0.99)")


def test_several_causes_are_all_named(job: Job) -> None:
    job.cache()
    edit_caption(job)
    change_dtype(job)
    change_tokenizer(job)
    [miss] = [one for one in job.plan().stale if one.sample == "sample-01" and one.artifact == "prompt_embeds"]
    assert miss.cause == "dtype changed (bfloat16 -> float16), tokenizer changed, caption changed"


def test_going_back_finds_the_earlier_records_again(job: Job) -> None:
    job.cache()
    change_dtype(job)
    job.cache()
    job.dtype = torch.bfloat16
    plan = job.plan()
    assert (plan.hits, plan.misses) == (42, 0)


def test_a_prompt_with_another_control_is_another_embedding(job: Job) -> None:
    job.samples = [replace(sample, prompt="the same words") for sample in job.samples]
    job.cache()
    keys = {artifacts["prompt_embeds"] for artifacts in job.previous.samples.values()}  # type: ignore[union-attr]
    assert len(keys) == 6
    assert_all_cached(job)


def test_a_deleted_sample_leaves_the_manifest_and_counts_as_removed(job: Job) -> None:
    job.cache()
    del job.samples[2]
    plan = job.plan()
    assert plan.removed == ["sample-02"] and "sample-02" not in plan.manifest.samples
    assert (plan.misses, plan.orphans) == (0, 7)
    assert "1 samples are no longer in the data set" in plan.describe()
    with pytest.raises(DataError, match="no sample 'sample-02'"):
        CachedSamples(job.store, plan.manifest).load("sample-02")


def test_a_new_sample_is_new_and_a_renamed_one_is_a_hit(job: Job) -> None:
    job.cache()
    job.samples.append(
        Sample("extra", picture(job.folder / "x.bmp", "x"), (picture(job.folder / "y.bmp", "y"),), "extra", (64, 64))
    )
    job.samples[0] = replace(job.samples[0], name="renamed")
    plan = job.plan()
    assert (plan.hits, plan.misses, plan.stale) == (42, 7, [])
    assert {(miss.sample, miss.cause) for miss in plan.missed} == {("extra", "new")}
    assert plan.as_dict()["to_encode"] == {"vae": 1, "text_encoder": 1, "none": 1}


def damage_truncate(content: bytes, other: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_bit(content: bytes, other: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 4]) + content[-4:]


def damage_swap(content: bytes, other: bytes) -> bytes:
    return other


@pytest.mark.parametrize("damage", [damage_truncate, damage_bit, damage_swap], ids=lambda value: value.__name__)
def test_a_damaged_record_is_quarantined_and_encoded_again(job: Job, damage: Callable[[bytes, bytes], bytes]) -> None:
    job.cache()
    paths = sorted((job.store.root / "objects").rglob("*.safetensors"))
    other = paths[0].read_bytes()
    keys = job.previous.samples["sample-03"]  # type: ignore[union-attr]
    [damaged] = [path for path in paths if path.stem == keys["prompt_embeds"]]
    damaged.write_bytes(damage(damaged.read_bytes(), other))
    reader = CachedSamples(job.store, job.previous)  # type: ignore[arg-type]
    with pytest.raises(RecordCorruptError, match="sample 'sample-03', prompt_embeds: record"):
        reader.load("sample-03")
    assert len(list((job.store.root / "quarantine").iterdir())) == 1
    plan = job.plan()
    assert [(miss.artifact, miss.cause) for miss in plan.missed] == [
        ("prompt_embeds", "missing in the store, or damaged")
    ]
    assert job.cache().encoded == 1
    assert_all_cached(job)


def test_a_torn_record_is_a_miss_before_anything_reads_it(job: Job) -> None:
    job.cache()
    path = next((job.store.root / "objects").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert job.plan().misses == 1
    assert job.cache().encoded == 1
    assert_all_cached(job)


def test_the_first_plan_and_a_finished_one_in_words(job: Job) -> None:
    assert job.plan().describe() == (
        "6 samples need 42 records: 0 are cached (0.0 MB), 42 are to be encoded\n      42 new\n"
        "still to write: an unknown size; how long vae and text_encoder will take is not known yet"
    )
    job.cache()
    assert job.plan().describe().endswith("MB): nothing is left to encode")


def test_problems_of_all_samples_are_listed_at_once(job: Job) -> None:
    job.samples[1].target.unlink()
    job.samples[4].controls[0].unlink()
    job.samples[5] = replace(job.samples[5], name="sample-00")
    with pytest.raises(DataError) as caught:
        job.plan()
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert all(word in problems for word in ("images/01.bmp", "control/04.bmp", "two samples are called 'sample-00'"))


def test_planning_works_on_a_cache_that_can_only_be_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.cache()

    def refuse(self: object) -> None:
        raise StoreUnavailableError("the file system is read-only")

    monkeypatch.setattr("dittocache.data.digests.ContentIndex.save", refuse)
    plan = job.plan()
    assert (plan.hits, plan.misses) == (42, 0)
    assert "files will be read again" in plan.describe() and plan.as_dict()["notes"]


def test_names_in_any_script_survive(tmp_path: Path) -> None:
    job = make_job(tmp_path, count=2)
    job.samples = [
        replace(job.samples[0], name="写真/été 🎨", target=picture(tmp_path / "写真/été 🎨.bmp", 1), prompt="空を青く"),
        replace(job.samples[1], name="مثال"),
    ]
    job.cache()
    assert_all_cached(job)
    job.previous.save(tmp_path / "manifest.json")  # type: ignore[union-attr]
    assert list(Manifest.load(tmp_path / "manifest.json").samples) == ["写真/été 🎨", "مثال"]


def test_a_second_plan_reads_no_weights(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = digests.hash_file
    monkeypatch.setattr(digests, "hash_file", lambda file: read.append(file.name) or real(file))
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**10))  # files as if they had been written long ago
    job.plan()
    assert read.count("model.safetensors") == 2
    read.clear()
    job.plan()
    assert read == []


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        (Storage("fp8"), "storage form changed (native -> fp8_e4m3_token)"),
        (Storage("float16"), "storage form changed (native -> float16)"),
        (Storage(shared_prefix=True), "sharing of rows with the empty prompt turned on"),
    ],
    ids=str,
)
def test_the_storage_form_is_a_cause(job: Job, storage: Storage, words: str) -> None:
    before = job.plan()
    index = ContentIndex(job.folder / "cache/content-index.json")
    after = make_plan(
        job.samples,
        job.family,
        job.sizes,
        job.model,
        job.dtype,
        job.store,
        index,
        previous=before.manifest,
        storage=storage,
    )
    assert {miss.cause for miss in after.stale} == {words}


def test_quantization_is_a_cause(job: Job) -> None:
    job.cache()
    (job.model / "text_encoder/config.json").write_text('{"width": 64, "quantization_config": {"bits": 4}}')
    assert {miss.cause for miss in job.plan().stale} == {"encoder config changed, quantization changed"}


def test_an_encoder_of_another_class_is_a_cause(job: Job) -> None:
    job.cache()
    index = job.model / "model_index.json"
    index.write_text(index.read_text().replace('"Vae"', '"OtherVae"'))
    assert {miss.cause for miss in job.plan().stale} == {"encoder changed"}


def test_a_cause_names_a_few_of_its_samples(job: Job) -> None:
    job.cache()
    change_dtype(job)
    plan = job.plan()
    assert "stale: dtype changed (bfloat16 -> float16) (sample-00, sample-01, sample-02)" in plan.describe()
    assert plan.as_dict()["examples"] == {
        "dtype changed (bfloat16 -> float16)": ["sample-00", "sample-01", "sample-02"]
    }
