"""Every family: training on what the store gives back is training with the encoders in memory, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.encode import encode_missing
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog
from dittocache.families.base import Family, Sizes, Tensors
from dittocache.families.estimates import size_estimator
from dittocache.training.config import TrainConfig
from dittocache.training.lora import add_lora
from dittocache.training.loss import loss_mask, velocity_losses
from dittocache.training.sources import CachedSource, LiveSource


def _variants(samples: list[Sample], mask: Path) -> list[Sample]:
    """Two samples as they are, and two that make use of all that a data set may ask for."""
    first = samples[0]
    return [
        *samples[:2],
        replace(first, name="mirrored", flipped=True, mask=mask, control_resolution="own"),
        replace(first, name="cut", cropped=True, mask=mask, control_resolution=160),
    ]


def _cache(family: Family, model: Path, samples: list[Sample], sizes: Sizes, folder: Path) -> tuple[Plan, Store]:
    store = Store(folder / "cache")
    index = ContentIndex(folder / "cache" / "index.json")
    plan = make_plan(samples, family, sizes, model, torch.float32, store, index)
    log = EventLog(folder / "events.jsonl", "cache")
    result = encode_missing(plan, [*family.encoders, None], family, model, torch.float32, "cpu", 2, store, log)
    assert not result.failed
    return plan, store


@pytest.mark.capability("training")
def test_what_is_read_from_the_store_is_what_the_encoders_give_bit_for_bit(
    family: Family,
    pipe: Any,
    case: Any,
    samples: list[Sample],
    sizes: Sizes,
    checkpoint: Any,
    tmp_path: Path,
    draw: Any,
) -> None:
    everything = _variants(samples, draw(tmp_path / "mask.png", 5, (60, 60)))
    plan, store = _cache(family, checkpoint(case), everything, sizes, tmp_path)
    cached = CachedSource(CachedSamples(store, plan.manifest))
    live = LiveSource(pipe, family, everything, sizes)
    for sample in everything:
        [stored], [encoded] = cached.load([sample.name]), live.load([sample.name])
        assert stored.keys() == encoded.keys() == {one.name for one in family.artifacts(sample, sizes)}
        for name, tensor in encoded.items():
            assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(stored[name], tensor), name
        assert cached.bucket(sample.name) == live.bucket(sample.name)
    again = make_plan(
        everything, family, sizes, checkpoint(case), torch.float32, store, ContentIndex(tmp_path / "index")
    )
    assert not again.misses


@pytest.mark.capability("lora")
def test_cached_and_live_training_have_the_same_losses_and_weights_bit_for_bit(
    family: Family, case: Any, samples: list[Sample], sizes: Sizes, checkpoint: Any, tmp_path: Path, draw: Any
) -> None:
    model = checkpoint(case)
    samples = [replace(samples[0], mask=draw(tmp_path / "mask.png", 5, (60, 60))), *samples[1:]]
    plan, store = _cache(family, model, samples, sizes, tmp_path)
    names = [sample.name for sample in samples]

    def train(cached: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        whole = family.load_pipeline(
            str(model), ["transformer", *([] if cached else _encoding(family))], torch.float32, "cpu"
        )
        assert (getattr(whole, "vae", None) is None) == cached
        source = (
            CachedSource(CachedSamples(store, plan.manifest)) if cached else LiveSource(whole, family, samples, sizes)
        )
        torch.manual_seed(3)
        parameters = add_lora(whole.transformer, family, TrainConfig(rank=4, alpha=4))
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        losses = []
        for step in range(3):
            batch: list[Tensors] = source.load(names)
            noise = torch.randn((len(batch), *batch[0]["image_latents"].shape))
            inputs = family.training_inputs(batch, noise, torch.tensor([0.2, 0.5, 0.9]).roll(step))
            mask = loss_mask(batch, names, torch.device("cpu"))
            assert mask is not None
            loss = velocity_losses(whole.transformer, inputs, torch.float32, mask).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        return losses, {name: value.detach() for name, value in whole.transformer.named_parameters()}

    cached_losses, cached_weights = train(cached=True)
    live_losses, live_weights = train(cached=False)
    assert all(torch.equal(*pair) for pair in zip(cached_losses, live_losses, strict=True))
    assert len({float(loss) for loss in cached_losses}) == 3
    assert cached_weights.keys() == live_weights.keys()
    assert all(torch.equal(weight, live_weights[name]) for name, weight in cached_weights.items())


def _encoding(family: Family) -> list[str]:
    return [name for encoder, beside in family.encoders.items() for name in (encoder, *beside)]


@pytest.mark.capability("artifacts")
def test_sizes_are_told_before_anything_is_encoded(
    family: Family,
    pipe: Any,
    case: Any,
    samples: list[Sample],
    sizes: Sizes,
    checkpoint: Any,
    tmp_path: Path,
    draw: Any,
) -> None:
    from dittocache.data.pictures import picture_size

    estimator = size_estimator(family.name, checkpoint(case))
    assert estimator is not None
    for sample in _variants(samples, draw(tmp_path / "mask.png", 5, (60, 60))):
        [tensors] = LiveSource(pipe, family, [sample], sizes).load([sample.name])
        told = {
            **estimator.latent_sizes(sample, sizes, picture_size),
            **estimator.text_sizes(sample, sizes, picture_size),
        }
        assert told.keys() == tensors.keys()
        for name, size in told.items():
            assert size.rows * size.width == tensors[name].numel(), name
            if size.element_bytes is not None:
                assert size.element_bytes == tensors[name].element_size(), name


@pytest.mark.capability("artifacts")
def test_artifacts_are_named_and_shaped_as_in_the_spec(
    family: Family, pipe: Any, case: Any, samples: list[Sample], sizes: Sizes
) -> None:
    [tensors] = LiveSource(pipe, family, samples, sizes).load([samples[0].name])
    flux = family.name.startswith("flux")
    names = {"image_latents", "prompt_embeds", "empty_prompt_embeds", "img_shapes"}
    names |= {"control_latents"} if case.controls else set()
    names |= (
        {"pooled_prompt_embeds", "empty_pooled_prompt_embeds"}
        if flux
        else {"prompt_embeds_mask", "empty_prompt_embeds_mask"}
    )
    assert set(tensors) == names
    width = pipe.transformer.config.joint_attention_dim
    for prefix in ("", "empty_"):
        rows, columns = tensors[f"{prefix}prompt_embeds"].shape
        assert columns == width
        if flux:
            assert rows == 512
            assert tensors[f"{prefix}pooled_prompt_embeds"].shape == (pipe.transformer.config.pooled_projection_dim,)
    for name in ("image_latents", "control_latents"):
        if name in tensors:
            assert tensors[name].ndim == 2
            assert tensors[name].shape[1] == 64
