"""`freeze_from_layer`: references are computed at every step in the layers before it, and kept from it on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.denoising import EDIT, EDITS, flux_transformer, qwen_transformer, relative_error, sigmas, velocities
from tests.referencekv.cached_steps import reference_kv, twice
from tests.referencekv.test_kontext import kontext_kwargs

from dittocache.errors import ReferenceCacheError
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached

STEPS = 4


def frozen_from(layer: int) -> ReferenceKVConfig:
    return ReferenceKVConfig(refresh=(0,), freeze_from_layer=layer)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_at_the_filling_steps_own_input_it_is_the_stock_step(edit: object) -> None:
    model = qwen_transformer(zero_cond_t=True)
    with torch.no_grad(), reference_kv(model, frozen_from(2)) as hook:
        full, again = twice(model, edit.kwargs(edit.latents(), 0.75))  # type: ignore[attr-defined]
        noise, batch, reference = edit.noise, edit.batch, edit.reference  # type: ignore[attr-defined]
        assert again.shape[1] == noise < full.shape[1]
        assert relative_error(again, full[:, :noise]) < 1e-5
        assert hook.bytes_held == batch * 2 * reference * 32 * 4  # one layer of three


def test_tokens_by_layer() -> None:
    model, lengths = qwen_transformer(), []
    for block in model.transformer_blocks:
        block.img_mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with cached(model, reference_kv=frozen_from(1)) as trace:
        velocities(model, EDIT, 2)
    whole = EDIT.noise + EDIT.reference
    assert lengths == [whole] * 3 + [whole, EDIT.noise, EDIT.noise]
    share = EDIT.reference / (whole + EDIT.text_tokens)
    assert [step.work for step in trace.steps] == pytest.approx([1.0, 1 - share * 2 / 3])


def test_the_first_step_and_the_live_layers_are_the_stock_ones() -> None:
    # With live t and frozen from the last layer on, the layers before it run exactly as in the stock model.
    stock_model, model = qwen_transformer(), qwen_transformer()
    found: list[list[torch.Tensor]] = [[], []]
    for one, outputs in ((stock_model, found[0]), (model, found[1])):
        one.transformer_blocks[1].register_forward_hook(lambda _, args, output, to=outputs: to.append(output[1]))
    stock = velocities(stock_model, EDIT, 2)["cond"]
    with reference_kv(model, frozen_from(2)):
        cached_run = velocities(model, EDIT, 2)["cond"]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(stock[0], cached_run[0])


def test_kontext_too() -> None:
    model = flux_transformer()
    with torch.no_grad(), reference_kv(model, frozen_from(3)):
        full, again = twice(model, kontext_kwargs(1.0))
        assert relative_error(again, full[:, :16]) < 1e-5
        assert len(sigmas(STEPS)) == STEPS


def test_residuals_of_a_controlnet_fit_all_layers_or_none() -> None:
    model = qwen_transformer()
    residuals = [torch.zeros(1, EDIT.noise + EDIT.reference, 32)]
    guided = replace(EDIT, extra={"controlnet_block_samples": residuals})
    with reference_kv(model, frozen_from(1)), pytest.raises(ReferenceCacheError, match="leave freeze_from_layer out"):
        velocities(model, guided, 2)
