"""Forms in which K and V are kept: what comes back, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.denoising import flux_transformer, qwen_transformer, relative_error

from dittocache.families.registry import adapter_of
from dittocache.referencekv.storage import FP8, MODULATED_INPUT, NATIVE, ReferenceSource

REFERENCE = 6


def key_value(dtype: torch.dtype = torch.float32, outlier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, REFERENCE, 3, 64, generator=generator)
    key[..., 5] *= outlier
    return key.to(dtype), value.to(dtype)


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@every_dtype
def test_native_is_what_was_computed(dtype: torch.dtype) -> None:
    key, value = key_value(dtype)
    packed = NATIVE.pack(key, value, None)
    assert all(map(torch.equal, packed.restore(packed.tensors), (key, value)))


@every_dtype
@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_the_error_of_8_bits_is_the_one_that_is_stated(dtype: torch.dtype, outlier: float) -> None:
    for tensor, found in zip(key_value(dtype, outlier), _through(FP8, *key_value(dtype, outlier)), strict=True):
        assert found.dtype == dtype
        exact, error = tensor.float(), (found.float() - tensor.float()).abs()
        scale = exact.abs().amax(-1, keepdim=True) / 448
        rounding = 1 + torch.finfo(dtype).eps  # of the product, in K's own dtype
        assert bool((error <= torch.maximum(exact.abs() * 2**-4 * rounding**4, scale * 2**-10 * rounding)).all())
        assert relative_error(found.float(), exact) < 0.03


@pytest.mark.parametrize("largest", [0.0, 1e-20, 3e4])
def test_8_bits_hold_any_range(largest: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        key = torch.full((1, 2, 1, 8), largest, dtype=dtype)
        found, _ = _through(FP8, key, key)
        assert torch.allclose(found, key, rtol=2**-4, atol=1e-7)


def test_tokens_do_not_share_a_scale() -> None:
    key, value = key_value()
    key[:, 0] *= 1e4
    found, _ = _through(FP8, key, value)
    assert torch.equal(found[:, 1:], _through(FP8, *key_value())[0][:, 1:])


@pytest.mark.parametrize("make", [qwen_transformer, flux_transformer], ids=["qwen", "flux"])
def test_k_and_v_come_back_from_the_modulated_input_bit_for_bit(make: Any) -> None:
    # Where the references run alone. Among other tokens a matrix product may round otherwise.
    model = make()
    adapter = adapter_of(model)
    modulated = torch.randn(2, REFERENCE, 32, generator=torch.Generator().manual_seed(1))
    frequencies: Any = torch.polar(torch.ones(REFERENCE, 8), torch.arange(REFERENCE * 8.0).reshape(REFERENCE, 8))
    if make is flux_transformer:
        angle = torch.arange(REFERENCE * 16.0).reshape(REFERENCE, 16)
        frequencies = angle.cos(), angle.sin()
        rotary, own = frequencies, frequencies
    else:
        rotary, own = (frequencies, frequencies[:0]), (frequencies,)
    for attention in adapter.attention_modules(model):
        text = modulated[:, :0] if getattr(attention, "added_kv_proj_dim", None) else None
        joint = adapter.joint_qkv(attention, modulated, text, rotary)
        assert all(map(torch.equal, adapter.reference_frequencies(rotary, REFERENCE), own))

        def project(tokens: Any, freqs: Any, attention: Any = attention) -> Any:
            return adapter.reference_kv(attention, tokens, freqs)

        packed = MODULATED_INPUT.pack(joint.key, joint.value, ReferenceSource(modulated, own, project))
        assert len(packed.tensors) == 1
        assert all(map(torch.equal, packed.restore(packed.tensors), (joint.key, joint.value)))


@every_dtype
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    key, value = key_value(dtype)
    source = ReferenceSource(torch.zeros(2, REFERENCE, 100, dtype=dtype), (), lambda tokens, frequencies: (key, value))
    for form in (NATIVE, FP8, MODULATED_INPUT):
        packed = form.pack(key, value, source)
        counted = 2 * REFERENCE * form.bytes_per_token(heads=3, head_width=64, width=100, element_size=dtype.itemsize)
        assert sum(tensor.nbytes for tensor in packed.tensors) == counted


def _through(form: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = form.pack(key, value, None)
    found: tuple[torch.Tensor, torch.Tensor] = packed.restore(packed.tensors)
    return found
