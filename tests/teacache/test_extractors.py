"""The registry of extractors, and the spec's two complete examples run as written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from tests.denoising import EDIT, Pipeline, counted, enliven, qwen_transformer, sigmas
from tests.teacache.spec_examples import extract_dualstream_context, extract_simplemodel_context
from torch import nn

from dittocache.errors import ConfigError, StepCacheError
from dittocache.families.registry import FAMILIES
from dittocache.families.transformer_side import CacheContext as FamilyContext
from dittocache.families.transformer_side import Polynomial
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.apply import setup_cache
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.extractors import EXTRACTOR_REGISTRY, CacheContext, get_extractor, register_extractor

STEPS = 6
WIDTH = 16


@pytest.fixture
def registered() -> Iterator[None]:
    register_extractor("SimpleModelPipeline", extract_simplemodel_context)
    register_extractor("DualStreamPipeline", extract_dualstream_context)
    yield
    del EXTRACTOR_REGISTRY["SimpleModelPipeline"], EXTRACTOR_REGISTRY["DualStreamPipeline"]


class TimeTextEmbed(nn.Module):
    """Timestep, guidance and pooled prompt to one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(1, WIDTH)

    def forward(self, timestep: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        return self.project(timestep[:, None] / 1000 - 0.5)


class JointBlock(nn.Module):
    """Mixes the mean of the text into the image; modulated like FLUX's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, temb: Any) -> Any:
        modulated, gate, *_ = self.norm1(hidden_states, emb=temb)
        text = encoder_hidden_states.mean(dim=1, keepdim=True)
        return encoder_hidden_states, hidden_states + gate[:, None] * self.mix(modulated + text)


class SimpleModelTransformer2DModel(nn.Module):
    """The spec's single-stream example model."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, WIDTH)
        self.context_embedder = nn.Linear(5, WIDTH)
        self.time_text_embed = TimeTextEmbed()
        self.transformer_blocks = nn.ModuleList([JointBlock() for _ in range(3)])
        self.norm_out = AdaLayerNormContinuous(WIDTH, WIDTH)
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        pooled_projections: Any = None,
        guidance: Any = None,
        return_dict: bool = True,
    ) -> Any:
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        temb = self.time_text_embed(timestep * 1000, pooled_projections)
        for block in self.transformer_blocks:
            text, image = block(image, text, temb=temb)
        output = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class DualBlock(nn.Module):
    """Doubles as Qwen's: separate modulation parameters for the image stream."""

    def __init__(self) -> None:
        super().__init__()
        self.img_mod = nn.Linear(WIDTH, 6 * WIDTH)
        self.img_norm1 = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def _modulate(self, hidden_states: torch.Tensor, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale, gate = parameters[:, None].chunk(3, dim=-1)
        return hidden_states * (1 + scale) + shift, gate

    def forward(
        self,
        hidden_states: Any,
        encoder_hidden_states: Any,
        encoder_hidden_states_mask: Any,
        temb: Any,
        image_rotary_emb: Any,
        joint_attention_kwargs: Any,
    ) -> Any:
        modulated, gate = self._modulate(self.img_norm1(hidden_states), self.img_mod(temb).chunk(2, dim=-1)[0])
        text = (encoder_hidden_states * encoder_hidden_states_mask[..., None]).mean(dim=1, keepdim=True)
        return encoder_hidden_states, hidden_states + gate * self.mix(modulated + text + image_rotary_emb)


class Positions(nn.Module):
    """One number a token."""

    def forward(self, img_shapes: Any, txt_seq_lens: Any, device: Any) -> torch.Tensor:
        return torch.linspace(0, 1, img_shapes[0], device=device)[:, None]


class DualStreamTransformer2DModel(nn.Module):
    """The spec's dual-stream example model."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in = nn.Linear(4, WIDTH)
        self.txt_norm = nn.LayerNorm(5)
        self.txt_in = nn.Linear(5, WIDTH)
        self.time_text_embed = TimeTextEmbed()
        self.pos_embed = Positions()
        self.transformer_blocks = nn.ModuleList([DualBlock() for _ in range(3)])
        self.norm_out = AdaLayerNormContinuous(WIDTH, WIDTH)
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: Any,
        txt_seq_lens: Any,
        attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        image, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
        temb = self.time_text_embed(timestep, image)
        positions = self.pos_embed(img_shapes, txt_seq_lens, device=image.device)
        for block in self.transformer_blocks:
            text, image = block(image, text, encoder_hidden_states_mask, temb, positions, attention_kwargs)
        output = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class SimpleModelPipeline(Pipeline):
    """Known to the registry by its class name."""


class DualStreamPipeline(Pipeline):
    """Known to the registry by its class name."""


def forward_kwargs(model: nn.Module, t: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(1000 * t))
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 7, 4, generator=generator),
        "encoder_hidden_states": torch.ones(2, 3, 5) * torch.arange(5),
        "timestep": torch.tensor([t, t]),
    }
    if isinstance(model, DualStreamTransformer2DModel):
        kwargs |= {"encoder_hidden_states_mask": torch.ones(2, 3), "img_shapes": [7], "txt_seq_lens": [3]}
    return kwargs


EXAMPLES = [
    (SimpleModelTransformer2DModel, SimpleModelPipeline),
    (DualStreamTransformer2DModel, DualStreamPipeline),
]


@pytest.mark.parametrize(("model_class", "pipeline_class"), EXAMPLES)
@pytest.mark.usefixtures("registered")
def test_the_specs_way_to_test_an_extractor(model_class: Any, pipeline_class: Any) -> None:
    model = enliven(model_class())
    extractor = get_extractor(pipeline_class.__name__)
    context = extractor(module=model, **forward_kwargs(model, 0.5))
    context.validate()
    outputs = context.run_transformer_blocks()
    assert len(outputs) >= 1
    assert torch.equal(context.postprocess(outputs[0]).sample, model(**forward_kwargs(model, 0.5)).sample)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("model_class", "pipeline_class"), EXAMPLES)
@pytest.mark.usefixtures("registered")
def test_the_specs_examples_cache(model_class: Any, pipeline_class: Any, bare: bool) -> None:
    model = enliven(model_class())
    target = model if bare else pipeline_class(model)
    stock = [model(**forward_kwargs(model, t)).sample for t in sigmas(STEPS)]
    settings: dict[str, Any] = {"num_inference_steps": STEPS}
    if bare:
        settings["model_type"] = pipeline_class.__name__

    exact = TeaCacheAdapter(TeaCacheConfig(rel_l1_thresh=0, **settings))
    exact.apply(target)
    for t, expected in zip(sigmas(STEPS), stock, strict=True):
        assert torch.equal(model(**forward_kwargs(model, t)).sample, expected)
    exact.remove(target)

    skipping = TeaCacheAdapter(TeaCacheConfig(rel_l1_thresh=1e6, max_consecutive_skips=2, **settings))
    skipping.apply(target)
    patterns, residual = "", None
    for t, expected in zip(sigmas(STEPS), stock, strict=True):
        kwargs = forward_kwargs(model, t)
        with counted(model.transformer_blocks) as ran:
            found = model(**kwargs).sample
        patterns += "c" if ran else "."
        context = get_extractor(pipeline_class.__name__)(module=model, **kwargs)
        if ran:
            assert torch.equal(found, expected)
            residual = context.run_transformer_blocks()[0] - context.hidden_states
        else:
            assert torch.equal(found, context.postprocess(context.hidden_states + residual).sample)
    assert patterns == "c..c.c"
    skipping.remove(target)


def test_every_family_is_registered_by_pipeline_and_transformer() -> None:
    for family in FAMILIES.values():
        for name in (family.pipeline_class_name, family.transformer.class_name):
            assert isinstance(get_extractor(name).__self__, type(family.transformer))  # type: ignore[attr-defined]
    assert "QwenImagePipeline" in list(EXTRACTOR_REGISTRY.keys())
    assert CacheContext is FamilyContext


def test_every_registered_pipeline_is_one_of_diffusers() -> None:
    import diffusers

    for name in EXTRACTOR_REGISTRY:
        assert hasattr(diffusers, name), name


def test_an_unknown_model_type_lists_those_there_are() -> None:
    with pytest.raises(StepCacheError, match=r"(?s)Unknown model type: 'NoPipeline'.*QwenImagePipeline"):
        get_extractor("NoPipeline")
    with pytest.raises(StepCacheError, match="Unknown model type"):
        TeaCacheAdapter(TeaCacheConfig(model_type="NoPipeline")).apply(qwen_transformer())


def test_a_model_that_nobody_knows_needs_a_model_type() -> None:
    with pytest.raises(StepCacheError, match="model_type must be provided in cache_config"):
        TeaCacheAdapter().apply(SimpleModelPipeline(SimpleModelTransformer2DModel()))


def test_a_model_type_of_another_model_is_an_error() -> None:
    with pytest.raises(StepCacheError, match="is for a FluxTransformer2DModel, but the transformer is a QwenImage"):
        TeaCacheAdapter(TeaCacheConfig(model_type="FluxPipeline")).apply(qwen_transformer())


def test_a_users_extractor_takes_precedence_until_it_is_forgotten() -> None:
    calls = []
    family = get_extractor("QwenImageTransformer2DModel")

    def mine(module: nn.Module, **kwargs: Any) -> CacheContext:
        calls.append(1)
        return family(module, **kwargs)

    model = qwen_transformer()
    register_extractor("QwenImageTransformer2DModel", mine, Polynomial((2.0, 0.0)))
    try:
        adapter = TeaCacheAdapter()
        hook = adapter.apply(model)
        assert hook._cache.make_gate().limits.coefficients == (2.0, 0.0)
        with torch.no_grad():
            found = model(**EDIT.kwargs(EDIT.latents(), 0.5))[0]
        adapter.remove(model)
        assert calls
        with torch.no_grad():
            assert torch.equal(found, model(**EDIT.kwargs(EDIT.latents(), 0.5))[0])
    finally:
        del EXTRACTOR_REGISTRY["QwenImageTransformer2DModel"]
    assert get_extractor("QwenImageTransformer2DModel") == family


def test_an_extractor_must_be_callable() -> None:
    with pytest.raises(StepCacheError, match="'X' must be callable, found int"):
        EXTRACTOR_REGISTRY["X"] = 3  # type: ignore[assignment]


def test_setup_cache() -> None:
    model = qwen_transformer()
    assert setup_cache(model, "none") is None
    adapter = setup_cache(model, "tea_cache", {"rel_l1_thresh": 0.3, "model_type": "QwenImagePipeline"})
    assert adapter is not None and adapter.config.rel_l1_thresh == 0.3
    adapter.reset(model)
    adapter.remove(model)
    alias = setup_cache(model, cache_config={"teacache_thresh": 0.15})
    assert alias is not None and alias.config.rel_l1_thresh == 0.15
    with pytest.raises(StepCacheError, match="unknown cache_adapter 'tea'; expected one of none, tea_cache"):
        setup_cache(model, "tea")
    with pytest.raises(ConfigError) as error:
        setup_cache(model, "tea_cache", {"rel_l1_thresh": -1, "ret_steps": 0, "spelling": 1})
    assert len(error.value.problems) == 3
    for wrong in ({"fitted_range": (0.5, 0.1)}, {"coefficients": (float("nan"),)}, {"rel_l1_thresh": float("inf")}):
        with pytest.raises(ConfigError):
            setup_cache(model, "tea_cache", wrong)


def test_coefficients_come_with_the_range_they_were_fitted_on() -> None:
    model = qwen_transformer()

    def policy(**settings: Any) -> Any:
        adapter = TeaCacheAdapter(TeaCacheConfig(**settings))
        found = adapter.apply(model)._cache.make_gate().limits
        adapter.remove(model)
        return found

    assert policy().fitted_range == (0.0, 0.33)
    assert policy(coefficients=policy().coefficients).fitted_range == (0.0, 0.33)
    assert policy(coefficients=(1.0, 0.0)).fitted_range is None
    assert policy(coefficients=(1.0, 0.0), fitted_range=(0.1, 0.2)).fitted_range == (0.1, 0.2)
