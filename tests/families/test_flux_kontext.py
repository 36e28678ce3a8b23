"""FLUX.1-Kontext: references in the sizes of the stock pipeline, at one megapixel and at other areas."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image, ImageOps

from dittocache.data.sample import Sample
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import DataError
from dittocache.families.base import Sizes
from dittocache.families.flux_kontext import reference_size
from dittocache.families.registry import get_family

KONTEXT = get_family("flux-kontext")
SIZES = Sizes(resolution=96)


class Seen(Exception):
    """Ends a pipeline's call where the test has seen enough."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("flux-kontext")


def draw(path: Path, seed: int, size: tuple[int, int]) -> Path:
    pixels = random.Random(seed).randbytes(3 * 6 * 5)
    Image.frombytes("RGB", (6, 5), pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    control = draw(tmp_path / "control.png", 2, (96, 64))
    return Sample("a", draw(tmp_path / "target.png", 1, (90, 60)), (control,), "make it red", (112, 80))


def artifacts_of(sample: Sample, sizes: Sizes = SIZES) -> dict[str, Any]:
    return {one.name: one for one in KONTEXT.artifacts(sample, sizes)}


def latents_of(pipe: Any, sample: Sample, sizes: Sizes = SIZES) -> dict[str, torch.Tensor]:
    [latents] = KONTEXT.encode(pipe, "vae", [sample], sizes)
    [facts] = KONTEXT.encode(pipe, None, [sample], sizes)
    return {**latents, **facts}


def test_references_have_the_sizes_that_the_pipeline_gives_them(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def resize(image: Any, height: int, width: int) -> Any:
        seen.append((width, height))
        raise Seen

    monkeypatch.setattr(pipe.image_processor, "resize", resize)
    prompt = {"prompt_embeds": torch.zeros(1, 4, 32), "pooled_prompt_embeds": torch.zeros(1, 32)}
    for auto_resize, resolution in ((True, 1024), (False, "own")):
        for width, height in [*product(range(17, 4000, 431), repeat=2), *PREFERRED_KONTEXT_RESOLUTIONS]:
            with pytest.raises(Seen):
                pipe(image=Image.new("1", (width, height)), _auto_resize=auto_resize, **prompt)
            assert reference_size(width, height, resolution) == seen[-1]  # type: ignore[arg-type]
    assert set(seen) >= set(PREFERRED_KONTEXT_RESOLUTIONS)


@torch.no_grad()
def test_at_one_megapixel_every_input_is_the_stock_pipelines_own(pipe: Any, sample: Sample) -> None:
    seen: list[dict[str, Any]] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)
        raise Seen

    width, height = 1248, 832
    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Seen):
        pipe(image=Image.open(sample.controls[0]), prompt=sample.prompt, width=width, height=height, guidance_scale=1.0)
    handle.remove()
    whole = replace(sample, size=(width, height))
    tensors = latents_of(pipe, whole, Sizes())
    for encoder in ("text_encoder", "text_encoder_2"):
        tensors |= KONTEXT.encode(pipe, encoder, [whole], Sizes())[0]
    assert tensors["prompt_embeds"].shape == (512, 32)
    assert tensors["pooled_prompt_embeds"].shape == (32,)
    assert tensors["img_shapes"].tolist() == [[1, 52, 78], [1, 52, 78]]
    noise = seen[0]["hidden_states"][:, : 52 * 78]
    ours = KONTEXT.training_inputs([tensors], noise, torch.ones(1)).transformer_kwargs
    for name, value in ours.items():
        assert torch.equal(value, seen[0][name]), name
    assert ours["img_ids"][:, 0].tolist() == [0.0] * (52 * 78) + [1.0] * (52 * 78)


@pytest.mark.parametrize("resolution", [64, 96, 128, 512, 768, 1024, 1536])
def test_other_areas_have_the_same_ratios(resolution: int) -> None:
    for width, height in PREFERRED_KONTEXT_RESOLUTIONS:
        across, down = reference_size(width, height, resolution)
        assert across % 16 == down % 16 == 0
        assert abs(across - width * resolution / 1024) <= 8
        assert abs(down - height * resolution / 1024) <= 8


def test_the_smallest_pictures_have_a_size_too() -> None:
    assert reference_size(3, 5, "own") == (16, 16)
    assert min(reference_size(1, 4000, 32)) == 16


@pytest.mark.parametrize(("control_resolution", "expected"), [(None, (112, 80)), (64, (80, 48)), ("own", (96, 64))])
def test_a_sample_may_say_the_size_of_its_reference(
    pipe: Any, sample: Sample, control_resolution: Any, expected: tuple[int, int]
) -> None:
    sized = replace(sample, control_resolution=control_resolution)
    tensors = latents_of(pipe, sized)
    width, height = expected
    assert tensors["img_shapes"].tolist() == [[1, 5, 7], [1, height // 16, width // 16]]
    assert len(tensors["control_latents"]) == width // 16 * (height // 16)
    same = artifacts_of(sized)["control_latents"] == artifacts_of(sample)["control_latents"]
    assert same == (control_resolution is None)
    assert artifacts_of(sized)["image_latents"] == artifacts_of(sample)["image_latents"]


def test_a_mirrored_sample_is_what_mirrored_files_are(pipe: Any, sample: Sample, tmp_path: Path) -> None:
    def mirrored(path: Path) -> Path:
        ImageOps.mirror(Image.open(path)).save(tmp_path / f"mirrored-{path.name}")
        return tmp_path / f"mirrored-{path.name}"

    masked = replace(sample, mask=draw(tmp_path / "mask.png", 3, (90, 60)))
    files = replace(
        masked,
        target=mirrored(masked.target),
        controls=tuple(map(mirrored, masked.controls)),
        mask=mirrored(tmp_path / "mask.png"),
    )
    found, expected = latents_of(pipe, replace(masked, flipped=True)), latents_of(pipe, files)
    plain = latents_of(pipe, masked)
    for name in ("image_latents", "control_latents", "loss_mask"):
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], plain[name])
        assert artifacts_of(replace(masked, flipped=True))[name] != artifacts_of(masked)[name]
    assert artifacts_of(replace(masked, flipped=True))["prompt_embeds"] == artifacts_of(masked)["prompt_embeds"]


@pytest.mark.parametrize("count", [0, 2])
def test_anything_but_one_reference_is_refused(sample: Sample, count: int) -> None:
    unfit = replace(sample, controls=sample.controls * count)
    with pytest.raises(DataError, match=f"sample 'a' has {count} control pictures .*exactly one"):
        KONTEXT.artifacts(unfit, SIZES)


@torch.no_grad()
def test_the_prediction_depends_on_the_reference_and_is_of_the_target_alone(pipe: Any, sample: Sample) -> None:
    tensors = latents_of(pipe, sample)
    for encoder in ("text_encoder", "text_encoder_2"):
        tensors |= KONTEXT.encode(pipe, encoder, [sample], SIZES)[0]
    noise = torch.randn(1, 35, 64, generator=torch.Generator().manual_seed(0))

    def predicted(batch: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        inputs = KONTEXT.training_inputs(batch, noise, torch.tensor([0.5]))
        return inputs.select(pipe.transformer(**inputs.transformer_kwargs, return_dict=False)[0])

    first = predicted([tensors])
    assert first.shape == (1, 35, 64)
    other = predicted([{**tensors, "control_latents": tensors["control_latents"].flip(0)}])
    assert (other - first).norm() / first.norm() > 1e-3
