"""Every family: the sampling caches on its stock pipeline, and nothing of them where they are off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.families.base import Family
from dittocache.families.stock_calls import output_size, picture_options
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 5
EXACT = TeaCacheConfig(rel_l1_thresh=0)
SKIPPING = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0), max_consecutive_skips=2)


@pytest.mark.capability("step_cache")
def test_the_pipeline_is_one_that_the_caches_know(family: Family, pipe: Any) -> None:
    assert type(pipe).__name__ == family.pipeline_class_name
    assert family.pipeline_class_name in family.transformer.pipeline_class_names


@pytest.mark.capability("step_cache")
def test_a_step_cache_that_skips_nothing_changes_nothing(pipe: Any, samples: list[Sample], stock_call: Any) -> None:
    stock = stock_call(pipe, samples[0], steps=STEPS)
    with cached(pipe, EXACT) as trace:
        assert torch.equal(stock_call(pipe, samples[0], steps=STEPS), stock)
    assert (trace.computed, trace.skipped) == (STEPS, 0)
    with cached(pipe, SKIPPING) as trace:
        skipped = stock_call(pipe, samples[0], steps=STEPS)
    assert (trace.computed, trace.skipped) == (3, 2)
    assert torch.isfinite(skipped).all()
    assert not torch.equal(skipped, stock)
    assert torch.equal(stock_call(pipe, samples[0], steps=STEPS), stock), "nothing may be left of a session"


@pytest.mark.capability("references")
def test_references_computed_at_every_step_change_nothing(pipe: Any, samples: list[Sample], stock_call: Any) -> None:
    stock = stock_call(pipe, samples[0], steps=STEPS)
    with cached(pipe, None, ReferenceKVConfig(refresh=1)):
        assert torch.equal(stock_call(pipe, samples[0], steps=STEPS), stock)
    with cached(pipe, SKIPPING, ReferenceKVConfig(refresh=(0,))) as trace:
        reused = stock_call(pipe, samples[0], steps=STEPS)
    assert (trace.computed, trace.references_reused) == (3, 2)
    assert torch.isfinite(reused).all()
    assert not torch.equal(reused, stock)
    assert torch.equal(stock_call(pipe, samples[0], steps=STEPS), stock)


@pytest.mark.capability("encoding")
def test_pictures_are_sampled_from_what_training_encodes(
    family: Family, pipe: Any, samples: list[Sample], sizes: Any, encode_all: Any
) -> None:
    # At another resolution than the pipeline's own, by the arguments that pictures are really generated with.
    sample = samples[0]
    seen: list[dict[str, Any]] = []
    pictures = [Image.open(path).convert("RGB") for path in sample.controls]
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    guidance = {"guidance_scale": 1.0} if "Flux" in type(pipe).__name__ else {"true_cfg_scale": 1.0}
    with picture_options(pipe, pictures, sample.size, sizes) as options:
        pipe(prompt=sample.prompt, num_inference_steps=2, output_type="latent", **guidance, **options)
    hook.remove()
    [tensors] = encode_all(family, pipe, [sample])
    tokens = len(tensors["image_latents"])
    assert torch.equal(seen[0]["encoder_hidden_states"][0], tensors["prompt_embeds"])
    references = seen[0]["hidden_states"][0, tokens:]
    assert torch.equal(references, tensors.get("control_latents", references[:0]))
    width, height = output_size(pipe, [picture.size for picture in pictures], sizes)
    assert width % family.size_multiple == height % family.size_multiple == 0
