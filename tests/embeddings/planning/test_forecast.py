"""What a plan says of bytes and time before anything is encoded, against what is written then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.embeddings.toy_family import Job

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.planning.rates import Rates, record_rate
from dittocache.embeddings.store.storage import Storage
from dittocache.embeddings.store.store import Store
from dittocache.families.base import Sizes
from dittocache.families.registry import get_family

SIZES = Sizes(128, 64)
FAMILIES = {"qwen-image": 0, "qwen-image-edit": 1, "qwen-image-edit-plus": 2, "flux": 0, "flux-kontext": 1}
PROMPTS = ["another", "paint the house red", "a much longer prompt, with many words, 写真 and an emoji 🎨, " * 4]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(tmp_path_factory.mktemp("model") / name, name) for name in FAMILIES}


def samples_in(folder: Path, controls: int) -> list[Sample]:
    def picture(name: str, size: tuple[int, int]) -> Path:
        Image.new("RGB", size, (len(name), 40, 90)).save(folder / name)
        return folder / name

    return [
        Sample(
            f"s{number}",
            picture(f"t{number}.png", (40, 30)),
            tuple(picture(f"c{number}-{which}.png", (30 + 20 * number, 50 + which)) for which in range(controls)),
            prompt,
            size,
        )
        for number, (prompt, size) in enumerate(zip(PROMPTS, [(128, 128), (160, 96), (96, 160)], strict=True))
    ]


@pytest.mark.parametrize(
    "storage",
    [Storage(), Storage("float16"), Storage("fp8"), Storage(shared_prefix=True), Storage("fp8", True)],
    ids=str,
)
@pytest.mark.parametrize("family_name", list(FAMILIES))
def test_the_estimate_is_what_is_written(
    tmp_path: Path, models: dict[str, Path], family_name: str, storage: Storage
) -> None:
    family, model = get_family(family_name), models[family_name]
    samples = samples_in(tmp_path, FAMILIES[family_name])
    store = Store(tmp_path / "cache")
    plan = make_plan(
        samples, family, SIZES, model, torch.float32, store, ContentIndex(tmp_path / "i.json"), storage=storage
    )
    estimate = plan.bytes_to_write
    assert estimate is not None and estimate.total == sum(estimate.by_artifact.values())
    written: dict[str, int] = {}
    for encoder in (*family.encoders, None):
        components = [encoder, *family.encoders[encoder]] if encoder else []
        pipe = family.load_pipeline(str(model), components, torch.float32, "cpu") if encoder else None
        tensors = family.encode(pipe, encoder, samples, SIZES)
        for need, of_sample in zip(plan.needs[encoder], tensors, strict=True):
            for name in sorted(need.keys, key=lambda one: not one.startswith("empty_")):
                key = need.keys[name]
                if key not in store:
                    length = store.write(key, of_sample[name], plan.recipe(key))
                    written[name] = written.get(name, 0) + length
    if storage.shared_prefix and family_name.startswith("flux"):
        # Which rows padding shares cannot be told: at most so many bytes.
        assert sum(written.values()) <= estimate.total * 1.01
        return
    for name, length in written.items():
        tolerance = 0.1 if "prompt" in name else 0.02
        assert estimate.by_artifact[name] == pytest.approx(length, rel=tolerance), name
    assert estimate.by_artifact.keys() == written.keys()
    assert estimate.total == pytest.approx(sum(written.values()), rel=0.05)
    assert f"still to write: about {estimate.total / 1e6:.1f} MB" in plan.describe()
    assert plan.as_dict()["bytes_to_write"] == estimate.total


def test_what_is_cached_is_not_counted(tmp_path: Path, models: dict[str, Path]) -> None:
    samples, store = samples_in(tmp_path, 2), Store(tmp_path / "cache")

    def planned() -> Plan:
        family = get_family("qwen-image-edit-plus")
        index = ContentIndex(tmp_path / "i.json")
        return make_plan(samples, family, SIZES, models["qwen-image-edit-plus"], torch.float32, store, index)

    before = planned()
    for artifact, key in before.manifest.samples["s1"].items():
        store.write(key, torch.zeros(3, 2), before.recipe(key)) if artifact != "prompt_embeds" else None
    after = planned()
    assert before.bytes_to_write is not None and after.bytes_to_write is not None
    assert 0 < after.bytes_to_write.by_artifact["image_latents"] < before.bytes_to_write.by_artifact["image_latents"]
    assert after.bytes_to_write.by_artifact["prompt_embeds"] == before.bytes_to_write.by_artifact["prompt_embeds"]


def test_time_is_told_where_it_was_measured(job: Job) -> None:
    path = job.folder / "rates.json"
    index = ContentIndex(job.folder / "index.json")

    def planned(**changes: object) -> Plan:
        other = replace(job, **changes)  # type: ignore[arg-type]
        return make_plan(
            other.samples,
            other.family,
            other.sizes,
            other.model,
            other.dtype,
            other.store,
            index,
            rates=Rates(path),
            devices={"vae": "cuda:1"},
        )

    record_rate(path, "Vae", "bfloat16", "cuda:0", 64, samples=4, seconds=2.0)
    plan = planned()
    assert plan.seconds_to_encode == {"vae": pytest.approx(3.0), "text_encoder": None}
    assert "about 3 s (vae); how long text_encoder will take is not known yet" in plan.describe()
    assert plan.as_dict()["seconds_to_encode"] == plan.seconds_to_encode
    for change in ({"dtype": torch.float32}, {"sizes": Sizes(128, 32)}):
        assert planned(**change).seconds_to_encode["vae"] is None


def test_rates_are_means_that_follow_a_faster_machine(tmp_path: Path) -> None:
    rates = Rates(tmp_path / "cache/rates.json")
    name = ("Vae", "bfloat16", "cpu", 64)
    assert rates.seconds_per_sample(*name) is None
    rates.record(*name, samples=10, seconds=10.0)
    rates.record(*name, samples=30, seconds=10.0)
    assert rates.seconds_per_sample(*name) == pytest.approx(0.5)
    for samples, seconds in ((0, 1.0), (5, 0.0), (5, float("nan"))):
        rates.record(*name, samples=samples, seconds=seconds)
    assert rates.seconds_per_sample(*name) == pytest.approx(0.5)
    rates.record(*name, samples=100_000, seconds=50_000.0)
    rates.record(*name, samples=2_000, seconds=200.0)
    assert rates.seconds_per_sample(*name) == pytest.approx((500 + 200) / 3000)
    (tmp_path / "cache/rates.json").write_text("{")
    assert rates.seconds_per_sample(*name) is None
    rates.record(*name, samples=1, seconds=1.0)
    assert rates.seconds_per_sample(*name) == 1.0


def test_encoding_teaches_how_long_it_takes(job: Job) -> None:
    job.seconds = 0.01
    index, rates = ContentIndex(job.folder / "index.json"), Rates(job.folder / "rates.json")
    plan = make_plan(
        job.samples, job.family, job.sizes, job.model, job.dtype, job.store, index, rates=rates, devices={"vae": "cpu"}
    )
    job.encode(plan)
    for encoder in ("Vae", "Text"):
        measured = rates.seconds_per_sample(encoder, "bfloat16", "cpu", job.sizes.resolution)
        assert measured is not None and 0.01 <= measured < 1.0
