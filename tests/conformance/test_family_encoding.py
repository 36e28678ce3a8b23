"""Every family: what is cached is what the stock pipeline computes, and its key holds all that determines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Family, Sizes
from dittocache.families.pictures import PictureRequest, fitted_size, resized_picture


def _keys(family: Family, sample: Sample, sizes: Sizes) -> dict[str, str]:
    """A stand-in for recipe keys: artifact name -> digest of all that the family says determines it."""
    keys = {}
    for artifact in family.artifacts(sample, sizes):
        parts = [
            (one.role, one.text if one.file is None else hashlib.sha256(one.file.read_bytes()).hexdigest())
            for one in artifact.inputs
        ]
        keys[artifact.name] = json.dumps([artifact.encoder, parts, dict(artifact.transform)], sort_keys=True)
    return keys


@pytest.mark.capability("artifacts")
def test_artifacts_are_what_the_encoders_give(family: Family, pipe: Any, samples: list[Sample], sizes: Sizes) -> None:
    artifacts = family.artifacts(samples[0], sizes)
    for encoder in (*family.encoders, None):
        [tensors] = family.encode(pipe, encoder, samples[:1], sizes)
        assert set(tensors) == {artifact.name for artifact in artifacts if artifact.encoder == encoder}


@dataclass(frozen=True)
class Change:
    """Something about a sample or a run, and the artifact that must follow it.

    Attributes:
        artifact: the tensor that changes; None where the family may not heed it.
        edits: also only for families that edit pictures.
    """

    apply: Callable[[Sample, Sizes, Any], tuple[Sample, Sizes]]
    artifact: str | None = None
    edits: bool = False


def _redraw(paths: Sequence[Path], seed: int, size: tuple[int, int], draw: Any) -> None:
    for path in paths:
        draw(path, seed, size)


def _other_target(sample: Sample, sizes: Sizes, draw: Any) -> tuple[Sample, Sizes]:
    _redraw([sample.target], 99, (100, 75), draw)
    return sample, sizes


def _other_controls(sample: Sample, sizes: Sizes, draw: Any) -> tuple[Sample, Sizes]:
    _redraw(sample.controls, 98, (90, 70), draw)
    return sample, sizes


def _other_mask(sample: Sample, sizes: Sizes, draw: Any) -> tuple[Sample, Sizes]:
    _redraw([sample.mask] if sample.mask else [], 97, (50, 50), draw)
    return sample, sizes


def _with(**fields: Any) -> Callable[[Sample, Sizes, Any], tuple[Sample, Sizes]]:
    return lambda sample, sizes, _: (replace(sample, **fields), sizes)


CHANGES = {
    "prompt": Change(_with(prompt="make it green"), "prompt_embeds"),
    "target": Change(_other_target, "image_latents"),
    "size": Change(_with(size=(96, 128)), "image_latents"),
    "flipped": Change(_with(flipped=True), "image_latents"),
    "flipped mask": Change(_with(flipped=True), "loss_mask"),
    "flipped control": Change(_with(flipped=True), "control_latents", edits=True),
    "cropped": Change(_with(cropped=True), "image_latents"),
    "cropped mask": Change(_with(cropped=True), "loss_mask"),
    "mask": Change(_other_mask, "loss_mask"),
    "control": Change(_other_controls, "control_latents", edits=True),
    "control_order": Change(lambda sample, sizes, _: (replace(sample, controls=sample.controls[::-1]), sizes)),
    "control_resolution": Change(_with(control_resolution=160), "control_latents", edits=True),
    "own control sizes": Change(_with(control_resolution="own"), "control_latents", edits=True),
    "resolution": Change(lambda sample, sizes, _: (sample, replace(sizes, resolution=160)), "control_latents", True),
    "condition_resolution": Change(lambda sample, sizes, _: (sample, replace(sizes, condition_resolution=128))),
}


@pytest.mark.capability("artifacts")
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_changes_a_tensor_changes_its_key(
    family: Family,
    pipe: Any,
    case: Any,
    samples: list[Sample],
    tmp_path: Path,
    change: Change,
    encode_all: Any,
    draw: Any,
    sizes: Sizes,
) -> None:
    sample = replace(samples[0], size=(128, 64), mask=draw(tmp_path / "mask.png", 96, (100, 75)))
    before, keys_before = encode_all(family, pipe, [sample], sizes)[0], _keys(family, sample, sizes)
    sample, sizes = change.apply(sample, sizes, draw)
    after, keys_after = encode_all(family, pipe, [sample], sizes)[0], _keys(family, sample, sizes)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rekeyed = {name for name in before if keys_before[name] != keys_after[name]}
    assert changed <= rekeyed, "a tensor changed under an unchanged key: it would be read stale"
    if change.artifact is not None and (case.controls or not change.edits):
        assert change.artifact in changed
    assert rekeyed != set(before), "a key must depend on nothing but what determines its tensor"


@pytest.mark.capability("references")
def test_the_pictures_that_the_text_encoder_sees_are_part_of_its_key(
    family: Family, pipe: Any, case: Any, samples: list[Sample], sizes: Sizes, encode_all: Any
) -> None:
    if not case.text_sees_controls:
        assert not any(family.pictures(name, samples[0], sizes) for name in family.encoders if name != "vae")
        return
    field = "resolution" if case.family_name == "qwen-image-edit" else "condition_resolution"
    [before] = encode_all(family, pipe, samples[:1], sizes)
    for sample, other in (
        (replace(samples[0], flipped=True), sizes),
        (samples[0], replace(sizes, **{field: 160})),
    ):
        [after] = encode_all(family, pipe, [sample], other)
        assert not torch.equal(before["prompt_embeds"], after["prompt_embeds"])
        assert _keys(family, samples[0], sizes)["prompt_embeds"] != _keys(family, sample, other)["prompt_embeds"]


@pytest.mark.capability("encoding")
def test_a_flipped_sample_is_the_sample_of_mirrored_files(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes, tmp_path: Path, encode_all: Any, draw: Any
) -> None:
    sample = replace(samples[0], mask=draw(tmp_path / "mask.png", 96, (100, 75)))
    [flipped] = encode_all(family, pipe, [replace(sample, flipped=True)], sizes)
    for path in (sample.target, *sample.controls, tmp_path / "mask.png"):
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    [mirrored] = encode_all(family, pipe, [sample], sizes)
    assert flipped.keys() == mirrored.keys()
    assert all(torch.equal(flipped[name], tensor) for name, tensor in mirrored.items())


@pytest.mark.capability("encoding")
def test_a_loss_mask_has_a_weight_for_every_target_token(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes, tmp_path: Path, encode_all: Any
) -> None:
    mask = Image.new("L", samples[0].size, 0)
    mask.paste(255, (64, 0, 128, 96))  # the right half
    mask.paste(128, (0, 0, 16, 16))  # the first token
    mask.save(tmp_path / "mask.png")
    plain, masked = encode_all(family, pipe, [samples[0], replace(samples[1], mask=tmp_path / "mask.png")], sizes)
    assert "loss_mask" not in plain
    weights = masked["loss_mask"]
    assert (weights.dtype, weights.shape) == (torch.float32, masked["image_latents"].shape[:1])
    expected = torch.tensor([[0.0] * 4 + [1.0] * 4] * 6)  # 6 rows of 8 tokens
    expected[0, 0] = 128 / 255
    torch.testing.assert_close(weights, expected.flatten())


@pytest.mark.capability("artifacts")
def test_shapes_and_dtypes(family: Family, pipe: Any, case: Any, samples: list[Sample], encode_all: Any) -> None:
    [tensors] = encode_all(family, pipe, samples[:1])
    width, height = samples[0].size
    assert tensors["image_latents"].shape == (width // 16 * (height // 16), 64)
    assert tensors["prompt_embeds"].ndim == 2
    shapes = tensors["img_shapes"]
    assert shapes.shape == (1 + case.controls, 3)
    assert shapes.dtype == torch.int32
    assert shapes[0].tolist() == [1, height // 16, width // 16]
    if case.controls:
        assert tensors["control_latents"].shape == (int(shapes[1:].prod(dim=1).sum()), 64)
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor.float()).all()
        if name.endswith("_mask"):
            assert tensor.dtype == torch.bool
            assert len(tensor) == len(tensors[name.removesuffix("_mask")])


@pytest.mark.capability("encoding")
def test_training_inputs_are_the_stock_first_step_bit_for_bit(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any, first_forward: Any
) -> None:
    # At sigma 1 the noisy latents are the pipeline's own start, so every input of the transformer must be the same.
    for sample in samples:
        stock = first_forward(pipe, sample)
        [tensors] = encode_all(family, pipe, [sample])
        noise = stock["hidden_states"][:, : len(tensors["image_latents"])]
        ours = family.training_inputs([tensors], noise, torch.ones(1)).transformer_kwargs
        ignored = {"return_dict", "attention_kwargs", "joint_attention_kwargs"}
        assert set(ours) == set(stock) - ignored
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == stock[name].dtype, name
                assert torch.equal(value, stock[name]), name
            else:
                assert value == stock[name], name


@pytest.mark.capability("references")
def test_target_latents_are_the_stock_reference_latents_of_the_same_picture(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any, first_forward: Any, draw: Any
) -> None:
    # The pipeline encodes references only; given the target as its reference, at the same size, it gives our latents.
    sample = replace(samples[0], size=(96, 96), controls=(draw(samples[0].target, 3, (75, 75)),))
    [tensors] = encode_all(family, pipe, [sample])
    stock = first_forward(pipe, sample)
    reference = stock["hidden_states"][0, len(tensors["image_latents"]) :]
    assert torch.equal(tensors["image_latents"], reference)
    assert torch.equal(tensors["control_latents"], reference)


@pytest.mark.capability("encoding")
def test_a_sample_is_encoded_the_same_alone_and_in_company(
    family: Family, pipe: Any, samples: list[Sample], encode_all: Any
) -> None:
    together = encode_all(family, pipe, samples)
    for sample, tensors in zip(samples, together, strict=True):
        [alone] = encode_all(family, pipe, [sample])
        for name, tensor in alone.items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.capability("encoding")
def test_only_what_is_wanted_is_encoded(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes, encode_all: Any
) -> None:
    whole = encode_all(family, pipe, samples)
    for name in whole[1]:
        parts = [
            family.encode(pipe, encoder, samples, sizes, wanted=[(), {name}, ()])
            for encoder in (*family.encoders, None)
        ]
        assert [sorted(set().union(*one)) for one in zip(*parts, strict=True)] == [[], [name], []]
        [tensor] = [part[1][name] for part in parts if name in part[1]]
        assert torch.equal(tensor, whole[1][name]), name


@pytest.mark.capability("encoding")
def test_an_edited_caption_passes_the_text_encoders_alone(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [name for name in family.encoders if name.startswith("text_encoder")]
    calls = {name: 0 for name in texts}
    for name in texts:
        hook = lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)  # noqa: E731
        getattr(pipe, name).register_forward_pre_hook(hook)
    for name in texts:
        prompts = {one.name for one in family.artifacts(samples[0], sizes) if one.encoder == name}
        family.encode(pipe, name, samples[:1], sizes, wanted=[{one for one in prompts if not one.startswith("empty")}])
        assert calls[name] == 1
        family.encode(pipe, name, samples[:1], sizes)
        assert calls[name] == 3
        family.encode(pipe, name, samples[:1], sizes, wanted=[set()])
        assert calls[name] == 3


@pytest.mark.capability("encoding")
def test_pictures_are_those_that_encode_asks_for(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes
) -> None:
    for encoder in (*family.encoders, None):
        names = {one.name for one in family.artifacts(samples[0], sizes) if one.encoder == encoder}
        for wanted in (names, *({name} for name in names), set()):
            asked: list[PictureRequest] = []

            def pictures(request: PictureRequest, asked: list[PictureRequest] = asked) -> Any:
                asked.append(request)
                return resized_picture(request)

            family.encode(pipe, encoder, samples[:1], sizes, wanted=[wanted], pictures=pictures)
            assert sorted(asked, key=str) == sorted(family.pictures(encoder, samples[0], sizes, wanted), key=str)


@pytest.mark.capability("encoding")
def test_pictures_are_prepared_bit_for_bit_as_the_pipeline_does(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes, tmp_path: Path
) -> None:
    from diffusers.utils import load_image

    turned = tmp_path / "turned.jpg"
    picture = Image.open(samples[0].target).convert("CMYK")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(turned, exif=exif)
    for path in (turned, samples[0].target):
        for encoder in family.encoders:
            for request in family.pictures(encoder, replace(samples[0], target=path), sizes):
                ours = resized_picture(request)
                width, height = ours.size
                stock = load_image(str(request.path))
                assert ours.tobytes() == pipe.image_processor.resize(stock, height, width).tobytes()
                preprocess = pipe.image_processor.preprocess
                assert torch.equal(preprocess(ours), preprocess(stock, height, width))


@pytest.mark.capability("references")
def test_controls_have_the_sizes_that_the_pipeline_gives_them(case: Any) -> None:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    for width in range(40, 4000, 173):
        for height in range(40, 4000, 191):
            for area in (384**2, 1024**2):
                assert fitted_size(width, height, area, 32) == calculate_dimensions(area, width / height)


@pytest.mark.capability("artifacts")
def test_shapes_are_one_record_for_all_samples_of_the_same_sizes(
    family: Family, case: Any, samples: list[Sample], sizes: Sizes, draw: Any
) -> None:
    keys = {_keys(family, sample, sizes)["img_shapes"] for sample in samples}
    assert len(keys) == 1
    if case.controls:
        draw(samples[0].controls[0], 55, (200, 30))
        assert _keys(family, samples[0], sizes)["img_shapes"] not in keys
    assert _keys(family, replace(samples[1], size=(96, 128)), sizes)["img_shapes"] not in keys


# Of the largest value. Measured on these tiny float32 models: latents 3.3e-6, prompts 3.6e-7. In bfloat16 a deviation
# is at least one rounding, 2e-3.
TOGETHER_TOLERANCE = 2e-5


@pytest.mark.capability("encoding")
def test_together_is_one_by_one_within_rounding_and_without_padding(
    family: Family, pipe: Any, samples: list[Sample], sizes: Sizes
) -> None:
    for encoder in (*family.encoders, None):
        calls: list[int] = []
        module = getattr(pipe, encoder) if encoder else torch.nn.Identity()
        watched = module.encoder if encoder == "vae" else module
        handle = watched.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        one_by_one = family.encode(pipe, encoder, samples, sizes)
        alone, calls[:] = len(calls), []
        together = family.encode(pipe, encoder, samples, sizes, together=True)
        assert len(calls) < alone or encoder is None
        handle.remove()
        for exact, batched in zip(one_by_one, together, strict=True):
            assert exact.keys() == batched.keys()
            for name, tensor in exact.items():
                assert (batched[name].shape, batched[name].dtype) == (tensor.shape, tensor.dtype), name
                deviation = (batched[name].double() - tensor.double()).abs().max()
                assert deviation <= TOGETHER_TOLERANCE * tensor.double().abs().max(), name


@pytest.mark.capability("encoding")
def test_each_encoder_works_alone_in_memory(
    family: Family, pipe: Any, case: Any, samples: list[Sample], checkpoint: Any, sizes: Sizes
) -> None:
    for encoder, beside in family.encoders.items():
        components = {encoder, *beside}
        alone = family.load_pipeline(str(checkpoint(case)), components, torch.float32, "cpu")
        assert {name for name, part in alone.components.items() if part is not None} == components
        [from_folder] = family.encode(alone, encoder, samples[:1], sizes)
        [in_memory] = family.encode(pipe, encoder, samples[:1], sizes)
        for name, tensor in in_memory.items():
            assert torch.equal(from_folder[name], tensor), name


@pytest.mark.capability("encoding")
def test_nothing_encoded_carries_a_gradient(family: Family, pipe: Any, samples: list[Sample], encode_all: Any) -> None:
    for parameter in (p for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()):
        parameter.requires_grad_(True)
    [tensors] = encode_all(family, pipe, samples[:1])
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors.values())


@pytest.mark.capability("encoding")
def test_a_broken_picture_is_named(family: Family, pipe: Any, samples: list[Sample], sizes: Sizes) -> None:
    samples[1].target.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=samples[1].target.name):
        family.encode(pipe, "vae", samples, sizes)
    samples[1].target.unlink()
    with pytest.raises(DataError, match=f"{samples[1].target.name} does not exist"):
        family.encode(pipe, "vae", samples, sizes)


@pytest.mark.capability("encoding")
def test_an_unknown_encoder_is_an_error(family: Family, pipe: Any, samples: list[Sample], sizes: Sizes) -> None:
    with pytest.raises(ModelError, match="no encoder 'vea'; expected vae"):
        family.encode(pipe, "vea", samples, sizes)
