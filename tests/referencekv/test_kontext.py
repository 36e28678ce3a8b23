"""FLUX Kontext: two kinds of blocks, references known by their ids, and no branch names from the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from tests.denoising import CHANNELS, DeviceReads, Pipeline, flux_transformer, relative_error, sigmas
from tests.referencekv.cached_steps import reference_kv, twice

from dittocache.referencekv.config import ReferenceKVConfig


def kontext_kwargs(t: float, seed: int = 0, text: float = 0.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    noise, reference = torch.zeros(16, 3), torch.ones(24, 3)
    noise[:, 1], noise[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    reference[:, 1], reference[:, 2] = torch.arange(24) // 4, torch.arange(24) % 4
    return {
        "hidden_states": torch.randn(1, 40, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator) + text,
        "pooled_projections": torch.full((1, 6), text),
        "timestep": torch.tensor([t]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cat([noise, reference]),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def test_kontext_is_exact_where_it_is_full() -> None:
    model = flux_transformer()
    with torch.no_grad():
        stock = [model(**kontext_kwargs(t, seed))[0] for seed, t in enumerate(sigmas(4))]
        with reference_kv(model, ReferenceKVConfig(refresh=1)):
            for seed, t in enumerate(sigmas(4)):
                assert torch.equal(model(**kontext_kwargs(t, seed))[0], stock[seed])
        with reference_kv(model):
            full, cached = twice(model, kontext_kwargs(1.0, 0))
    assert torch.equal(full, stock[0])
    assert cached.shape[1] == 16
    assert relative_error(cached, full[:, :16]) < 1e-5


def test_unnamed_branches_of_a_pipeline_are_told_apart_by_their_order_at_each_step() -> None:
    pipe = Pipeline(flux_transformer())
    pipe.scheduler.set_timesteps(4)
    found: dict[float, list[torch.Tensor]] = {0.0: [], 1.0: []}
    latents = torch.zeros(1, 16, CHANNELS)
    with reference_kv(pipe), torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            for text in found:
                if text == 1.0 and step == 3:
                    continue  # guidance ends before the run does
                found[text].append(pipe.transformer(**kontext_kwargs(float(t) / 1000, 0, text))[0][:, :16])
            latents = pipe.scheduler.step(latents, t, latents)[0]
    for text, outputs in found.items():
        alone = flux_transformer()
        with reference_kv(alone), torch.no_grad():
            timesteps = pipe.scheduler.timesteps[: len(outputs)]
            expected = [alone(**kontext_kwargs(float(t) / 1000, 0, text))[0][:, :16] for t in timesteps]
        assert all(map(torch.equal, outputs, expected))


def test_counting_the_references_reads_the_device_once_a_run() -> None:
    model, kwargs = flux_transformer(), kontext_kwargs(1.0)
    pipe = Pipeline(model)
    pipe.scheduler.set_timesteps(4)
    latents = torch.zeros(1, 16, CHANNELS)
    reads = []
    with reference_kv(pipe), torch.no_grad():
        for t in pipe.scheduler.timesteps:
            with DeviceReads() as mode:
                model(**kwargs)
            reads.append(mode.count)
            latents = pipe.scheduler.step(latents, t, latents)[0]
    assert reads == [1, 0, 0, 0]
