"""TeaCache on a stock transformer: exact where it computes, known arithmetic where it skips."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from tests.denoising import (
    CHANNELS,
    EDIT,
    EDITS,
    DeviceReads,
    Edit,
    Pipeline,
    counted,
    equal,
    flux_transformer,
    qwen_transformer,
    relative_error,
    sigmas,
    velocities,
)
from tests.teacache.skipped_steps import EXACT, GUIDED, SKIPPED, SKIPPING, STEPS, run, teacache

from dittocache.errors import ModelError, StepCacheError
from dittocache.families.qwen_image_transformer import QwenImageTransformerAdapter
from dittocache.teacache import gates
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_threshold_zero_is_the_stock_model_bit_for_bit(edit: Edit, zero_cond_t: bool) -> None:
    guided = replace(edit, branches=("cond", "uncond"))
    stock = velocities(qwen_transformer(zero_cond_t), guided, STEPS)
    assert equal(run(EXACT, guided, zero_cond_t=zero_cond_t), stock)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_computed_steps_are_stock_and_skipped_steps_are_not(zero_cond_t: bool) -> None:
    stock = velocities(qwen_transformer(zero_cond_t), EDIT, STEPS)["cond"]
    found = run(SKIPPING, zero_cond_t=zero_cond_t)["cond"]
    assert {step for step in range(STEPS) if not torch.equal(found[step], stock[step])} == SKIPPED


def test_a_computed_step_returns_all_tokens_and_a_skipped_one_the_noise() -> None:
    model = qwen_transformer()
    tokens = []
    with teacache(model, SKIPPING), torch.no_grad():
        for t in sigmas(STEPS):
            tokens.append(model(**EDIT.kwargs(EDIT.latents(), t))[0].shape[1])
    whole = EDIT.noise + EDIT.reference
    assert tokens == [EDIT.noise if step in SKIPPED else whole for step in range(STEPS)]


class Doubling(QwenImageTransformerBlock):
    """A block that doubles the image stream: three of them make the residual 7 times the input."""

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        return encoder_hidden_states, 2 * hidden_states


def test_a_skipped_step_adds_the_last_computed_residual() -> None:
    model = qwen_transformer()
    for block in model.transformer_blocks:
        block.__class__ = Doubling
    found = velocities_of_inputs(model, SKIPPING)
    steps = found["inputs"]
    for step, output in enumerate(found["outputs"]):
        now = steps[step]
        last_computed = steps[0] if step < 4 else steps[4]
        stack_output = now + 7 * last_computed if step in SKIPPED else 8 * now
        temb = model.time_text_embed(torch.tensor([sigmas(STEPS)[step]]), stack_output)
        expected = model.proj_out(model.norm_out(stack_output, temb))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def velocities_of_inputs(model: Any, config: TeaCacheConfig) -> dict[str, list[torch.Tensor]]:
    """Embedded noise tokens and outputs of a run."""
    found: dict[str, list[torch.Tensor]] = {"inputs": [], "outputs": []}
    with teacache(model, config), torch.no_grad():
        for step, t in enumerate(sigmas(STEPS)):
            latents = EDIT.with_seed(step).latents()
            found["inputs"].append(model.img_in(latents))
            found["outputs"].append(model(**EDIT.kwargs(latents, t))[0][:, : EDIT.noise])
    return found


def test_a_skipped_step_runs_nothing_that_it_does_not_need() -> None:
    model = qwen_transformer()
    first = model.transformer_blocks[0]
    allowed = {id(part) for part in (model.img_in, model.time_text_embed, model.norm_out, model.proj_out)}
    allowed |= {id(part) for part in (first.img_mod, first.img_norm1)}
    allowed |= {id(part) for name, part in model.named_modules() if name.startswith(("time_text", "norm_out"))}
    allowed |= {id(part) for part in first.img_mod}
    unwanted = [part for part in model.modules() if id(part) not in allowed and part is not model]
    assert {"RMSNorm", "QwenEmbedRope", "QwenImageTransformerBlock"} <= {type(part).__name__ for part in unwanted}
    with teacache(model, SKIPPING), torch.no_grad():
        model(**EDIT.kwargs(EDIT.latents(), 1.0))
        with counted(unwanted) as ran:
            model(**EDIT.kwargs(EDIT.latents(), 0.9))
    assert ran == []


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_the_signal_is_that_of_the_noise_tokens(zero_cond_t: bool) -> None:
    # References are the larger part of the tokens and do not move: they would dilute the distance.
    model = qwen_transformer(zero_cond_t)
    adapter, edit = QwenImageTransformerAdapter(), EDITS["two references"]
    latents = [edit.latents(), edit.with_seed(1).latents()]
    distances = []
    with teacache(model, SKIPPING) as hook, torch.no_grad():
        whole = [adapter.extract_context(model, **edit.kwargs(latents[i], 1 - i / 8)) for i in range(2)]
        for i in range(2):
            model(**edit.kwargs(latents[i], 1 - i / 8))
        distances.append(next(iter(hook._runs.values())).gate._decisions[0].distance)
    before, after = (context.modulated_input for context in whole)
    noise = slice(edit.noise)
    expected = (after[:, noise] - before[:, noise]).abs().mean() / before[:, noise].abs().mean()
    diluted = (after - before).abs().mean() / before.abs().mean()
    assert distances[0] == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 1.2 * float(diluted)


def test_branches_keep_their_own_residuals() -> None:
    # Each branch must give what it gives alone.
    together = run(SKIPPING, GUIDED)
    for branch in GUIDED.branches:
        alone = run(SKIPPING, replace(GUIDED, branches=(branch,)))
        assert equal({branch: together[branch]}, alone)


def test_guidance_may_be_dropped_and_taken_up_in_the_middle() -> None:
    model = qwen_transformer()
    alone = run(SKIPPING, GUIDED)
    with teacache(model, SKIPPING), torch.no_grad():
        latents, drift = GUIDED.latents(), GUIDED.with_seed(50).latents()
        for step, t in enumerate(sigmas(STEPS)):
            for branch in GUIDED.branches:
                if branch == "uncond" and step not in (2, 3, 6, 7):
                    continue  # comes in at a step that cond skips, and drops out again
                with model.cache_context(branch):
                    output = model(**GUIDED.kwargs(latents, t, branch))[0][:, : GUIDED.noise]
                if branch == "cond" or step == 7:
                    assert torch.equal(output, alone[branch][step])
                if branch == "uncond" and step == 2:  # nothing to reuse yet: computed, though cond skips
                    assert torch.equal(output, velocities(qwen_transformer(), GUIDED, STEPS)[branch][2])
            latents = latents - drift * (1 + step % 3) / STEPS


def test_branches_share_one_decision_where_the_signal_ignores_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[float]] = []
    relative_l1 = gates.relative_l1
    monkeypatch.setattr(gates, "relative_l1", lambda *pair: measured.append(relative_l1(*pair)) or measured[-1])
    run(SKIPPING, GUIDED)
    assert len(measured) == STEPS - 3  # not the first and the last step, nor behind three skips
    contexts = [
        QwenImageTransformerAdapter().extract_context(
            qwen_transformer(), **GUIDED.kwargs(GUIDED.latents(), 0.5, branch)
        )
        for branch in GUIDED.branches
    ]
    assert torch.equal(contexts[0].modulated_input, contexts[1].modulated_input)


def test_flux_decides_branch_by_branch() -> None:
    # FLUX's signal depends on the pooled prompt.
    model = flux_transformer()
    config = SKIPPING.model_copy(update={"rel_l1_thresh": 0.35})
    with teacache(model, config) as hook, torch.no_grad():
        for t in sigmas(STEPS):
            for branch, pooled in (("cond", 0.0), ("uncond", 5.0)):
                with model.cache_context(branch):
                    model(**flux_kwargs(t, pooled))
        found = [next(iter(hook._runs.values())).branches[branch].gate for branch in ("cond", "uncond")]
    assert found[0] is not found[1]


def flux_kwargs(t: float, pooled: float = 0.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(t * 1000))
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(1, 16, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator),
        "pooled_projections": torch.full((1, 6), pooled),
        "timestep": torch.tensor([t]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def test_flux_with_threshold_zero_is_stock_and_skips_otherwise() -> None:
    def outputs(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**flux_kwargs(t))[0] for t in sigmas(STEPS)]

    stock = outputs(flux_transformer())
    model = flux_transformer()
    with teacache(model, EXACT):
        assert all(map(torch.equal, outputs(model), stock))
    with teacache(model, SKIPPING):
        found = outputs(model)
    assert {step for step in range(STEPS) if not torch.equal(found[step], stock[step])} == SKIPPED


def test_one_read_from_the_device_a_step_with_a_pipeline() -> None:
    pipe = Pipeline(qwen_transformer())
    pipe.scheduler.set_timesteps(STEPS)
    latents, reads = EDIT.latents(), []
    with teacache(pipe, SKIPPING.model_copy(update={"num_inference_steps": None})), torch.no_grad():
        for t in pipe.scheduler.timesteps:
            arguments = {branch: EDIT.kwargs(latents, float(t) / 1000, branch) for branch in ("cond", "uncond")}
            with DeviceReads() as mode:
                for branch, kwargs in arguments.items():
                    with pipe.transformer.cache_context(branch):
                        output = pipe.transformer(**kwargs)[0]
            reads.append(mode.count)
            latents = pipe.scheduler.step(output[:, : EDIT.noise], t, latents)[0]
    assert reads == [0, 1, 1, 1, 0, 1, 1, 0]


def test_controlnet_residuals_pass_through() -> None:
    residuals = [0.5 * torch.randn(1, EDIT.noise + EDIT.reference, 32, generator=torch.Generator().manual_seed(3))]
    edit = replace(EDIT, extra={"controlnet_block_samples": residuals})
    stock = velocities(qwen_transformer(), edit, STEPS)
    assert not equal(stock, velocities(qwen_transformer(), EDIT, STEPS))
    assert equal(run(EXACT, edit), stock)
    found = run(SKIPPING, edit)["cond"]
    assert {step for step in range(STEPS) if not torch.equal(found[step], stock["cond"][step])} == SKIPPED


def test_a_bare_transformer_whose_steps_nobody_counts_says_so(caplog: pytest.LogCaptureFixture) -> None:
    run(SKIPPING.model_copy(update={"num_inference_steps": None}))
    assert "does not know the number of steps" in caplog.text


def test_a_cache_that_never_triggers_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = qwen_transformer()
    with teacache(model, SKIPPING.model_copy(update={"rel_l1_thresh": 1e-6})):
        for _ in range(3):
            velocities(model, EDIT, STEPS)
    assert caplog.text.count("skipped none of 8 calls") == 1


def test_too_few_steps_are_said(caplog: pytest.LogCaptureFixture) -> None:
    run(SKIPPING.model_copy(update={"num_inference_steps": 2}), steps=2)
    assert "can skip none of 2 steps" in caplog.text
    assert "reference KV cache" in caplog.text


def test_nothing_is_said_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    run(SKIPPING, GUIDED)
    run(EXACT, GUIDED)
    assert caplog.text == ""


def test_taken_off_nothing_is_left() -> None:
    model = qwen_transformer()
    before = set(model.__dict__), len(model.transformer_blocks[0]._forward_pre_hooks)
    stock = velocities(copy.deepcopy(model), EDIT, STEPS)
    with teacache(model, SKIPPING):
        velocities(model, EDIT, STEPS, stop=3)
    assert (set(model.__dict__), len(model.transformer_blocks[0]._forward_pre_hooks)) == before
    assert len(model.norm_out._forward_pre_hooks) == 0
    assert equal(velocities(copy.deepcopy(model), EDIT, STEPS), stock)


def test_used_out_of_turn_it_says_what_to_do() -> None:
    model, adapter = qwen_transformer(), TeaCacheAdapter(SKIPPING)
    with pytest.raises(StepCacheError, match="not on for this QwenImageTransformer2DModel; apply it first"):
        adapter.reset(model)
    adapter.apply(model)
    with pytest.raises(StepCacheError, match="on for this QwenImageTransformer2DModel already"):
        adapter.apply(model)
    adapter.remove(model)
    with pytest.raises(StepCacheError, match="not on"):
        adapter.remove(model)
    with pytest.raises(ModelError, match="no transformer in str"):
        adapter.apply("a string")


def test_reset_starts_a_new_run() -> None:
    model, adapter = qwen_transformer(), TeaCacheAdapter(SKIPPING)
    adapter.apply(model)
    with torch.no_grad():
        model(**EDIT.kwargs(EDIT.latents(), 0.9))
        adapter.reset(model)
        # Without the reset this call, at a later timestep, would have been skipped.
        found = model(**EDIT.kwargs(EDIT.latents(), 0.8))[0]
        assert torch.equal(found, qwen_transformer()(**EDIT.kwargs(EDIT.latents(), 0.8))[0])


def test_a_cache_of_diffusers_must_be_off() -> None:
    from diffusers import FirstBlockCacheConfig

    model = qwen_transformer()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ModelError, match="disable_cache"):
        TeaCacheAdapter(SKIPPING).apply(model)


def test_positional_arguments_are_understood() -> None:
    model = qwen_transformer()
    kwargs = EDIT.kwargs(EDIT.latents(), 0.5)
    names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes")
    with torch.no_grad():
        stock = model(**kwargs)[0]
        with teacache(model, SKIPPING):
            found = model(*(kwargs[name] for name in names), return_dict=False)[0]
    assert torch.equal(found, stock)
    assert relative_error(found, stock) == 0
