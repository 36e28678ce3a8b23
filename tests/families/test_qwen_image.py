"""What sets the Qwen-Image families apart from one another, beyond what the conformance suite asks of each."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit_module
from PIL import Image

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Sizes
from dittocache.families.estimates import size_estimator
from dittocache.families.qwen_image_sizes import pipeline_sizes
from dittocache.families.registry import get_family

SIZES = Sizes(resolution=96, condition_resolution=64)


class Seen(Exception):
    """Raised in place of a forward pass: what comes before it is all that a test looks at."""


def draw(path: Path, size: tuple[int, int]) -> Path:
    pixels = random.Random(len(path.name)).randbytes(3 * 6 * 5)
    Image.frombytes("RGB", (6, 5), pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    target, control = draw(tmp_path / "target.png", (100, 75)), draw(tmp_path / "control.png", (120, 70))
    return Sample("one", target, (control,), "make it red", (128, 96))


@pytest.mark.parametrize(
    ("family_name", "controls", "problem"),
    [
        ("qwen-image", 1, "'one' has control pictures, which qwen-image cannot use: it makes pictures from text alone"),
        ("qwen-image-edit", 0, "'one' has 0 control pictures; qwen-image-edit edits exactly one"),
        (
            "qwen-image-edit",
            2,
            "'one' has 2 control pictures; .*choose a checkpoint of qwen-image-edit-plus for several",
        ),
        ("qwen-image-edit-plus", 0, "'one' has no control picture; qwen-image-edit-plus edits pictures"),
    ],
)
def test_a_wrong_number_of_controls_is_named(sample: Sample, family_name: str, controls: int, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        get_family(family_name).artifacts(replace(sample, controls=sample.controls * controls), SIZES)


@pytest.mark.parametrize("family_name", ["qwen-image", "qwen-image-edit", "qwen-image-edit-plus"])
def test_a_vae_of_another_scale_is_refused(sample: Sample, family_name: str) -> None:
    pipe = tiny_pipeline(family_name)
    pipe.vae_scale_factor = 16
    with pytest.raises(ModelError, match="one packed latent of 32 pixels a side; expected 16"):
        get_family(family_name).encode(pipe, "vae", [sample], SIZES)


def test_a_long_prompt_is_cut_where_the_stock_call_cuts_it(sample: Sample, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen-image")
    family, pipe = get_family("qwen-image"), tiny_pipeline("qwen-image")
    seen: list[dict[str, Any]] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)
        raise Seen

    pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    long = replace(sample, controls=(), prompt=" ".join(str(number) for number in range(300)))
    with pytest.raises(Seen):
        pipe(prompt=long.prompt, width=64, height=64, num_inference_steps=2, true_cfg_scale=1.0)
    short = replace(long, name="two", prompt="a")
    [exact] = family.encode(pipe, "text_encoder", [long], SIZES)
    assert exact["prompt_embeds"].shape == (512, 32)
    assert torch.equal(exact["prompt_embeds"], seen[0]["encoder_hidden_states"][0])
    together = family.encode(pipe, "text_encoder", [long, short], SIZES, together=True)
    torch.testing.assert_close(together[0]["prompt_embeds"], exact["prompt_embeds"], rtol=1e-4, atol=1e-4)
    estimator = size_estimator("qwen-image", model)
    assert estimator is not None
    assert estimator.text_sizes(long, SIZES, picture_size)["prompt_embeds"].rows == 512


def test_the_first_edit_model_at_one_megapixel_is_the_untouched_pipeline(sample: Sample) -> None:
    family, pipe = get_family("qwen-image-edit"), tiny_pipeline("qwen-image-edit")
    seen: list[dict[str, Any]] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)
        raise Seen

    pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Seen), torch.no_grad():
        pipe(image=Image.open(sample.controls[0]), prompt=sample.prompt, width=128, height=96, true_cfg_scale=1.0)
    tensors: dict[str, torch.Tensor] = {}
    wanted = [{"image_latents", "control_latents", "prompt_embeds", "prompt_embeds_mask", "img_shapes"}]
    for encoder in (*family.encoders, None):
        tensors |= family.encode(pipe, encoder, [sample], Sizes(), wanted=wanted)[0]
    assert tensors["img_shapes"].tolist() == [[1, 6, 8], [1, 48, 84]]  # 1344 x 768
    noise = seen[0]["hidden_states"][:, :48]
    ours = family.training_inputs([tensors], noise, torch.ones(1)).transformer_kwargs
    assert torch.equal(ours["hidden_states"], seen[0]["hidden_states"])
    assert torch.equal(ours["encoder_hidden_states"], seen[0]["encoder_hidden_states"])
    assert ours["img_shapes"] == seen[0]["img_shapes"]


def test_the_first_edit_model_has_no_condition_size_of_its_own(sample: Sample) -> None:
    family = get_family("qwen-image-edit")
    other = replace(SIZES, condition_resolution=512)
    assert family.artifacts(sample, SIZES) == family.artifacts(sample, other)
    assert family.pictures("text_encoder", sample, SIZES) == family.pictures("vae", sample, SIZES, {"control_latents"})


def test_sizes_within_sizes_are_the_inner_ones_and_end_with_them() -> None:
    stock = edit_module.calculate_dimensions
    assert stock(1024 * 1024, 2.0) == (1440, 736, None)
    with pipeline_sizes(Sizes(512)):
        with pipeline_sizes(SIZES):
            assert edit_module.calculate_dimensions(1024 * 1024, 1.0) == (96, 96, None)
        assert edit_module.calculate_dimensions(1024 * 1024, 1.0) == (512, 512, None)
    assert edit_module.calculate_dimensions is stock


def test_controls_of_their_own_size_are_rounded_not_scaled(sample: Sample) -> None:
    for family_name in ("qwen-image-edit", "qwen-image-edit-plus"):
        family = get_family(family_name)
        [facts] = family.encode(None, None, [replace(sample, control_resolution="own")], SIZES)
        assert facts["img_shapes"].tolist() == [[1, 6, 8], [1, 4, 8]]  # 120 x 70 becomes 128 x 64
