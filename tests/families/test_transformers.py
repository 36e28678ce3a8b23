"""Transformer sides: a forward taken apart and put together is the stock forward, whatever it is called with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.denoising import CHANNELS, EDIT, EDITS, Edit, enliven, flux_transformer, qwen_transformer

from dittocache.families.flux_transformer import FluxTransformerAdapter
from dittocache.families.qwen_image_transformer import QwenImageTransformerAdapter
from dittocache.families.transformer_side import TokenLayout


def reassembled(adapter: Any, model: Any, kwargs: dict[str, Any]) -> Any:
    context = adapter.extract_context(model, **kwargs)
    context.validate()
    return context.postprocess(context.run_transformer_blocks()[0])


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_qwen(edit: Edit, zero_cond_t: bool) -> None:
    model = qwen_transformer(zero_cond_t)
    tokens = edit.noise + edit.reference
    extra = {"controlnet_block_samples": [torch.randn(edit.batch, tokens, 32) for _ in range(2)]}
    for kwargs in (edit.kwargs(edit.latents(), 0.5), replace(edit, extra=extra).kwargs(edit.latents(), 0.5)):
        assert torch.equal(reassembled(QwenImageTransformerAdapter(), model, kwargs)[0], model(**kwargs)[0])
        kwargs["return_dict"] = True
        found = reassembled(QwenImageTransformerAdapter(), model, kwargs)
        assert torch.equal(found.sample, model(**kwargs).sample)


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_flux(guidance: bool) -> None:
    model = flux_transformer(guidance)
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(16, 3)
    ids[:, 1] = torch.arange(16)
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 16, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.tensor([0.5, 0.5]),
        "guidance": torch.tensor([3.5, 3.5]) if guidance else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    controls = {
        "controlnet_block_samples": [torch.randn(2, 16, 32, generator=generator)],
        "controlnet_single_block_samples": [torch.randn(2, 16, 32, generator=generator)],
    }
    for extra in ({}, controls, {**controls, "controlnet_blocks_repeat": True}):
        call = {**kwargs, **extra}
        assert torch.equal(reassembled(FluxTransformerAdapter(), model, call)[0], model(**call)[0])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_the_lora_scale_of_a_call_reaches_every_part(scale: float) -> None:
    model = qwen_transformer()
    targets = ["img_in", "img_mod.1", "to_q", "norm_out.linear", "proj_out", "txt_in"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    enliven(model)
    kwargs = replace(EDIT, extra={"attention_kwargs": {"scale": scale}}).kwargs(EDIT.latents(), 0.5)
    stock = model(**kwargs)[0]
    assert torch.equal(reassembled(QwenImageTransformerAdapter(), model, kwargs)[0], stock)
    assert torch.equal(model(**kwargs)[0], stock)  # the scale was put back
    if scale != 1:
        kwargs["attention_kwargs"] = {}
        assert not torch.equal(model(**kwargs)[0], stock)


def test_token_layout() -> None:
    adapter, model = QwenImageTransformerAdapter(), qwen_transformer()

    def layout(tokens: int, img_shapes: Any) -> TokenLayout:
        kwargs = {"hidden_states": torch.zeros(2, tokens, CHANNELS), "img_shapes": img_shapes}
        return adapter.token_layout(model, kwargs)

    assert layout(40, [[(1, 4, 4), (1, 6, 4)]] * 2) == TokenLayout(16, 24)
    assert layout(16, [[(1, 4, 4)]] * 2) == TokenLayout(16, 0)
    assert layout(16, [(1, 4, 4)] * 2) == TokenLayout(16, 0)
    assert layout(40, None) == TokenLayout(40, 0)
    # Samples that are laid out differently, or fewer tokens than the first picture has: none is surely a reference.
    assert layout(40, [[(1, 4, 4), (1, 6, 4)], [(1, 6, 4), (1, 4, 4)]]) == TokenLayout(40, 0)
    assert layout(8, [[(1, 4, 4)]]) == TokenLayout(8, 0)


def test_a_layered_model_has_its_reference_last() -> None:
    model = qwen_transformer()
    model.register_to_config(use_layer3d_rope=True)
    kwargs = {"hidden_states": torch.zeros(1, 40, CHANNELS), "img_shapes": [[(1, 4, 4), (1, 2, 4), (1, 4, 4)]]}
    assert QwenImageTransformerAdapter().token_layout(model, kwargs) == TokenLayout(24, 16, layers=2)


@torch.no_grad()
def test_one_index_modulates_all_tokens_of_a_picture() -> None:
    model, adapter = qwen_transformer(zero_cond_t=True), QwenImageTransformerAdapter()
    block: Any = model.transformer_blocks[0]
    seen: list[dict[str, Any]] = []
    block.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    edit = replace(EDIT, batch=2)
    model(**edit.kwargs(edit.latents(), 0.5))
    layout = TokenLayout(edit.noise, edit.reference)
    [kwargs] = seen
    kwargs["hidden_states"] = kwargs["hidden_states"][:, : edit.noise]
    one = adapter.noise_only_block(kwargs, layout)
    each = adapter.noise_only_block(kwargs, replace(layout, layers=2))  # the second layer has an index of its own
    assert one["modulate_index"].shape == (2, 1)
    assert torch.equal(each["modulate_index"], kwargs["modulate_index"][:, : edit.noise])
    for found, expected in zip(block(**one), block(**each), strict=True):
        assert torch.equal(found, expected)
