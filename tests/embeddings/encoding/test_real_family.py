"""Sessions with pipelines of the real classes: what samples share is encoded once a run, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.encoding.encode import encode_missing
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.families.base import Batching, Family, Sizes
from dittocache.families.registry import get_family

SIZES = Sizes(64, 32)
ENCODERS = {"flux": ["text_encoder", "text_encoder_2"], "qwen-image-edit-plus": ["vae", "text_encoder"]}


@pytest.fixture(scope="module", params=list(ENCODERS))
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / family.name, family.name)


def samples_in(folder: Path, family: Family) -> list[Sample]:
    def draw(name: str) -> Path:
        Image.effect_noise((40, 40), 80.0).convert("RGB").save(folder / name)
        return folder / name

    controls = ("qwen" in family.name) * 1
    return [
        Sample(
            f"{number}",
            draw(f"{number}.png"),
            tuple(draw(f"{number}-{one}.png") for one in range(controls)),
            f"paint {'it ' * number}red",
            (64, 64),
        )
        for number in range(4)
    ]


def cache(
    folder: Path, family: Family, model: Path, samples: list[Sample], batching: Batching, workers: int = 0
) -> tuple[Plan, Store]:
    store = Store(folder / f"store-{batching}-{workers}")
    index = ContentIndex(folder / "index.json")
    plan = make_plan(samples, family, SIZES, model, torch.float32, store, index, batching=batching)
    log = EventLog(folder / "events.jsonl", "cache")
    where: Any = (model, torch.float32, "cpu", 2, store, log)
    encode_missing(plan, [*ENCODERS[family.name], None], family, *where, num_workers=workers)
    return plan, store


def test_the_empty_prompt_is_encoded_once_a_run(
    tmp_path: Path, family: Family, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}
    load = type(family).load_pipeline

    def watched(self: Family, path: str, components: Any, *where: Any) -> Any:
        pipe = load(self, path, components, *where)  # type: ignore[arg-type]
        module = getattr(pipe, components[0])
        module.register_forward_pre_hook(lambda *_: calls.__setitem__(components[0], calls.get(components[0], 0) + 1))
        return pipe

    monkeypatch.setattr(type(family), "load_pipeline", watched)
    cache(tmp_path, family, model, samples_in(tmp_path, family), "exact")
    if family.name == "flux":
        assert calls == {"text_encoder": 5, "text_encoder_2": 5}
    else:
        assert calls["text_encoder"] == 8  # its empty prompt shows the sample's own picture


def test_company_and_processes_change_nothing_beyond_rounding(tmp_path: Path, family: Family, model: Path) -> None:
    samples = samples_in(tmp_path, family)
    exact_plan, exact = cache(tmp_path, family, model, samples, "exact")
    fed_plan, fed = cache(tmp_path, family, model, samples, "exact", workers=1)
    together_plan, together = cache(tmp_path, family, model, samples, "together")
    assert fed_plan.manifest.samples == exact_plan.manifest.samples
    for name, keys in exact_plan.manifest.samples.items():
        for artifact, key in keys.items():
            if artifact == "image_latents" and family.name == "flux":
                continue  # its VAE has not run here
            tensor = exact.read(key)
            assert torch.equal(fed.read(key), tensor)
            other = together_plan.manifest.samples[name][artifact]
            assert (other == key) == (artifact == "img_shapes")
            torch.testing.assert_close(together.read(other), tensor, rtol=1e-4, atol=1e-5)
