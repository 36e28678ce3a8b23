"""Every family: what is cached is what the stock pipeline computes, and its key holds all that determines it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError, ModelError
from dittocache.families.base import Family, Sizes


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


@pytest.mark.capability("artifacts")
@pytest.mark.parametrize(
    "change", ["prompt", "target", "control", "control_order", "size", "resolution", "condition_resolution"]
)
def test_whatever_changes_a_tensor_changes_its_key(
    family: Family,
    pipe: Any,
    case: Any,
    samples: list[Sample],
    tmp_path: Path,
    change: str,
    encode_all: Any,
    draw: Any,
    sizes: Sizes,
) -> None:
    sample = samples[0]
    before, keys_before = encode_all(family, pipe, [sample], sizes)[0], _keys(family, sample, sizes)
    if change == "prompt":
        sample = replace(sample, prompt="make it green")
    elif change == "target":
        draw(sample.target, 99, (100, 75))
    elif change == "control":
        for path in sample.controls:
            draw(path, 98, (90, 70))
    elif change == "control_order":
        sample = replace(sample, controls=sample.controls[::-1])
    elif change == "size":
        sample = replace(sample, size=(96, 128))
    else:
        sizes = replace(sizes, **{change: 128})
    after, keys_after = encode_all(family, pipe, [sample], sizes)[0], _keys(family, sample, sizes)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rekeyed = {name for name in before if keys_before[name] != keys_after[name]}
    assert changed <= rekeyed, "a tensor changed under an unchanged key: it would be read stale"
    expected = {"prompt": "prompt_embeds", "target": "image_latents", "size": "image_latents"}
    if case.controls:
        expected |= {"control": "control_latents", "control_order": "control_latents"}
        expected |= {"resolution": "control_latents", "condition_resolution": "prompt_embeds"}
    if change in expected:
        assert expected[change] in changed
    assert rekeyed != set(before), "a key must depend on nothing but what determines its tensor"


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
def test_empty_prompts_can_be_left_out(family: Family, pipe: Any, samples: list[Sample], sizes: Sizes) -> None:
    for encoder in (*family.encoders, None):
        [whole] = family.encode(pipe, encoder, samples[:1], sizes)
        [part] = family.encode(pipe, encoder, samples[:1], sizes, empty_prompts=False)
        assert set(part) == {name for name in whole if not name.startswith("empty_")}
        assert all(torch.equal(whole[name], tensor) for name, tensor in part.items())


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


@pytest.mark.capability("artifacts")
def test_masks_are_refused_rather_than_ignored(family: Family, samples: list[Sample], sizes: Sizes) -> None:
    masked = replace(samples[0], mask=samples[0].target)
    with pytest.raises(DataError, match="mask"):
        family.artifacts(masked, sizes)
