"""The configuration guide's examples, with a tiny checkpoint in the place of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache import Omni, OmniDiffusionConfig
from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.errors import ConfigError, ModelError, StepCacheError

PIPELINE = "QwenImagePipeline"
CALL = {"width": 64, "height": 64, "num_inference_steps": 8, "output_type": "latent", "true_cfg_scale": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "qwen", "qwen-image"))


def config(checkpoint: str, **settings: Any) -> OmniDiffusionConfig:
    return OmniDiffusionConfig(model=checkpoint, dtype="float32", device="cpu", **settings)


def picture(omni: Omni) -> torch.Tensor:
    latents: torch.Tensor = omni.generate(prompt="a cat", generator=torch.Generator().manual_seed(1), **CALL).images
    return latents


# Random weights move far from step to step: distances are taken as they are, against a large threshold.
SKIPPING = {"rel_l1_thresh": 100.0, "coefficients": [1.0, 0.0]}


def test_the_guides_example_generates_with_the_cache_and_leaves_nothing_behind(checkpoint: str) -> None:
    omni = Omni(config(checkpoint, model_class_name=PIPELINE, cache_adapter="tea_cache", cache_config=SKIPPING))
    assert omni.config.cache_config is not None
    assert omni.config.cache_config.model_type == PIPELINE
    first, again = picture(omni), picture(omni)
    assert omni.trace.skipped > 0
    assert torch.equal(first, again)
    plain = Omni(config(checkpoint, cache_adapter="none"))
    stock = tiny_pipeline("qwen-image")(prompt="a cat", generator=torch.Generator().manual_seed(1), **CALL).images
    assert torch.equal(picture(plain), stock)
    assert not torch.equal(first, stock)
    assert (
        not hasattr(omni.pipeline.transformer, "_diffusers_hook") or not omni.pipeline.transformer._diffusers_hook.hooks
    )


def test_the_environment_names_the_cache_where_the_configuration_does_not(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_ADAPTER", "tea_cache")
    assert OmniDiffusionConfig.from_kwargs(model=checkpoint).cache_adapter == "tea_cache"
    assert OmniDiffusionConfig.from_kwargs(model=checkpoint, cache_adapter="none").cache_adapter == "none"
    assert OmniDiffusionConfig(model=checkpoint).cache_adapter == "none"
    monkeypatch.setenv("DIFFUSION_CACHE_ADAPTER", "teacache")
    with pytest.raises(ConfigError, match="found 'teacache'; expected none or tea_cache"):
        OmniDiffusionConfig.from_kwargs(model=checkpoint)


def test_yaml_with_the_guides_keys_and_with_lightx2vs(tmp_path: Path, checkpoint: str) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(
        f"model: {checkpoint}\nmodel_class_name: {PIPELINE}\ncache_adapter: tea_cache\n"
        f"cache_config:\n  rel_l1_thresh: 0.4\n  model_type: {PIPELINE}\n"
    )
    read = OmniDiffusionConfig.from_yaml(file)
    assert read.cache_config is not None and read.cache_config.rel_l1_thresh == 0.4
    file.write_text(f"model: {checkpoint}\nfeature_caching: Tea\nteacache_thresh: 0.26\ninfer_steps: 4\n")
    read = OmniDiffusionConfig.from_yaml(file)
    assert read.cache_adapter == "tea_cache"
    assert read.cache_config is not None
    assert (read.cache_config.rel_l1_thresh, read.cache_config.num_inference_steps) == (0.26, 4)
    file.write_text("model: [")
    with pytest.raises(ConfigError, match=r"stage\.yaml cannot be read"):
        OmniDiffusionConfig.from_yaml(file)
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        OmniDiffusionConfig.from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_adapter": "tea"}, "expected none or tea_cache"),
        ({"cache_config": {"rel_l1_tresh": 0.2}}, "rel_l1_tresh"),
        ({"cache_config": {"model_type": "FluxPipeline"}, "model_class_name": PIPELINE}, "they must be the same"),
        ({"feature_caching": "Taylor"}, "expected Tea or NoCaching"),
        ({"cache_adaptor": "tea_cache"}, "cache_adaptor"),
    ],
)
def test_wrong_settings_are_named(checkpoint: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(checkpoint, **settings)


def test_the_documented_errors(checkpoint: str) -> None:
    with pytest.raises(StepCacheError, match="Unknown model type: 'YourModelPipeline'"):
        Omni(config(checkpoint, cache_adapter="tea_cache", cache_config={"model_type": "YourModelPipeline"}))
    with pytest.raises(ModelError, match="is a QwenImagePipeline"):
        Omni(config(checkpoint, cache_adapter="tea_cache", model_class_name="FluxPipeline"))


def test_a_transformer_that_nobody_knows_needs_a_model_type() -> None:
    pipe = tiny_pipeline("qwen-image")
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(StepCacheError, match="model_type must be provided in cache_config"):
        Omni(OmniDiffusionConfig(model="unused", cache_adapter="tea_cache"), pipe)


def test_the_steps_of_the_configuration_are_those_of_a_picture(checkpoint: str) -> None:
    lightx2v = {"feature_caching": "Tea", "teacache_thresh": 100.0, "coefficients": [1.0, 0.0], "infer_steps": 4}
    omni = Omni(config(checkpoint, **lightx2v))
    omni.generate(prompt="a cat", **{name: value for name, value in CALL.items() if name != "num_inference_steps"})
    assert omni.trace.summary().startswith("run 1, cond: 4 steps, 2 computed, 2 skipped")


def test_settings_without_a_cache_are_said(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    Omni(config(checkpoint, cache_config=SKIPPING, cache_adapter="none"), tiny_pipeline("qwen-image"))
    assert not caplog.records
    Omni(config(checkpoint, cache_config=SKIPPING), tiny_pipeline("qwen-image"))
    assert "set cache_adapter to tea_cache" in caplog.text


def test_a_failed_call_leaves_nothing_for_the_next(checkpoint: str) -> None:
    omni = Omni(config(checkpoint, cache_adapter="tea_cache", cache_config=SKIPPING))
    before = picture(omni)
    with pytest.raises(ValueError):
        omni.generate(prompt=None, **CALL)
    assert torch.equal(picture(omni), before)
