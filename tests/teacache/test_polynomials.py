"""Published coefficients: whose they are, where they may be trusted, and which pipeline gets which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.denoising import Pipeline, flux_transformer, qwen_transformer
from tests.sampled_models import flux2_transformer, qwen21_transformer, z_image_transformer

from dittocache.families.polynomials import PLAIN, PUBLISHED
from dittocache.families.registry import step_adapters
from dittocache.families.transformer_side import MODULATED_INPUT
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.extractors import polynomial_of
from dittocache.teacache.policy import GatePolicy, polynomial


def policy(target: Any, **settings: Any) -> GatePolicy:
    adapter = TeaCacheAdapter(TeaCacheConfig(**settings))
    limits = adapter.apply(target)._cache.make_gate().limits
    adapter.remove(target)
    assert isinstance(limits, GatePolicy)
    return limits


class FluxPipeline(Pipeline):
    """Known by its name."""


class FluxKontextPipeline(Pipeline):
    """Known by its name."""


class Flux2Pipeline(Pipeline):
    """Known by its name."""


class Flux2KleinPipeline(Pipeline):
    """Known by its name."""


CHOSEN = [
    (qwen_transformer, "qwen-image-spec"),
    (flux_transformer, "flux"),
    (lambda: FluxPipeline(flux_transformer()), "flux"),
    (lambda: FluxKontextPipeline(flux_transformer()), "flux-kontext"),
    (lambda: Flux2Pipeline(flux2_transformer()), None),
    (lambda: Flux2KleinPipeline(flux2_transformer()), "flux2-klein-base"),
    (qwen21_transformer, None),
    (z_image_transformer, None),
]


@pytest.mark.parametrize(("build", "name"), CHOSEN)
def test_every_pipeline_gets_the_coefficients_of_its_model(build: Any, name: str | None) -> None:
    expected = PLAIN if name is None else PUBLISHED[name]
    found = policy(build())
    assert (found.coefficients, found.fitted_range) == (expected.coefficients, expected.fitted_range)


def test_the_specs_defaults() -> None:
    assert polynomial_of("QwenImagePipeline").coefficients == (-4.5e02, 2.8e02, -4.5e01, 3.2e00, -2.0e-02)
    assert polynomial_of("FluxPipeline").coefficients == (
        4.98651651e02,
        -2.83781631e02,
        5.58554382e01,
        -3.82021401e00,
        2.64230861e-01,
    )


def test_a_model_type_names_the_coefficients_of_a_bare_transformer() -> None:
    assert policy(flux_transformer(), model_type="FluxKontextPipeline").coefficients == (
        PUBLISHED["flux-kontext"].coefficients
    )


def test_published_coefficients_bring_the_range_they_were_fitted_on() -> None:
    other = PUBLISHED["qwen-image-2512"]
    found = policy(qwen_transformer(), coefficients=other.coefficients)
    assert found.fitted_range == other.fitted_range == (0.08094493952514002, 0.4705715918534816)
    assert policy(qwen_transformer(), coefficients=other.coefficients, fitted_range=(0.1, 0.2)).fitted_range == (
        0.1,
        0.2,
    )


def test_no_model_has_a_polynomial_of_another_signal_by_default() -> None:
    assert {one.signal for one in PUBLISHED.values()} != {MODULATED_INPUT}
    for adapter in step_adapters():
        for chosen in (adapter.polynomial, *adapter.polynomials.values()):
            assert chosen.signal == MODULATED_INPUT


def test_polynomials_of_pipelines_belong_to_pipelines_of_the_model() -> None:
    for adapter in step_adapters():
        assert set(adapter.polynomials) <= set(adapter.pipeline_class_names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_where_it_may_be_trusted_it_is_positive_and_beyond_where_it_stops_rising_it_is_not_asked(name: str) -> None:
    published = PUBLISHED[name]
    low, high = published.fitted_range or (0.0, 1.0)
    values = [polynomial(published.coefficients, float(x)) for x in np.linspace(low, high, 500)]
    assert min(values[1:]) > 0 or name == "qwen-image-spec"  # the spec's begins below 0, where the gate takes 0
    assert published.source
    if name in ("qwen-image-spec", "flux-kontext"):  # ranges that no source names: they end at the top
        step = 0.01
        assert values[-1] > values[-20]
        assert polynomial(published.coefficients, high + 2 * step) < polynomial(published.coefficients, high + step)
