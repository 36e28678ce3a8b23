"""The configuration guide's entry point: one configuration that loads a pipeline with its cache, and generates.

    config = OmniDiffusionConfig(model="Qwen/Qwen-Image", cache_adapter="tea_cache")
    outputs = Omni(config).generate(prompt="A cat sitting on a windowsill", num_inference_steps=50)

Four ways lead to the same cache: these arguments, `DIFFUSION_CACHE_ADAPTER` in the environment with `from_kwargs`, a
YAML file, and the command line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from dittocache.errors import ConfigError, ModelError
from dittocache.families.loading import component_names, load_components, model_index
from dittocache.families.registry import FAMILIES
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.cache_keys import ADAPTER_VARIABLE, in_guides_words
from dittocache.sampling.session import cached
from dittocache.sampling.trace import Trace
from dittocache.settings import Settings
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.apply import CACHE_ADAPTERS
from dittocache.teacache.config import TeaCacheConfig

logger = logging.getLogger(__name__)


class OmniDiffusionConfig(Settings):
    """A model and the caches to run it with.

    Keys of LightX2V's configurations are understood: `feature_caching: Tea`, `teacache_thresh`, `coefficients`,
    `infer_steps`.
    """

    model: str = Field(min_length=1)
    """Folder or hub id of a diffusers checkpoint."""

    model_class_name: str | None = None
    """Pipeline class, such as `QwenImagePipeline`; read from the checkpoint when left out."""

    cache_adapter: str = "none"
    """`tea_cache` or `none`."""

    cache_config: TeaCacheConfig | None = None
    """Settings of the cache; `model_type` is `model_class_name` when left out."""

    use_image_kv_cache: bool = False
    """Keep keys and values of reference pictures, with `reference_kv`'s settings."""

    reference_kv: ReferenceKVConfig = ReferenceKVConfig()
    """Settings of the reference KV cache."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the weights."""

    device: str = "auto"
    """`cuda`, `cpu`, ...; `auto` takes the first GPU, else the CPU."""

    def __init__(self, **settings: Any) -> None:
        """Raises ConfigError naming every setting that is wrong."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problems = [": ".join([".".join(map(str, one["loc"])), one["msg"]]).lstrip(": ") for one in error.errors()]
            raise ConfigError(f"{len(problems)} problem(s) with the configuration", problems) from error

    @classmethod
    def from_kwargs(cls, **settings: Any) -> Self:
        """As the class itself; without `cache_adapter` the environment variable names the cache."""
        named = os.environ.get(ADAPTER_VARIABLE)
        if named and "cache_adapter" not in settings and "feature_caching" not in settings:
            settings["cache_adapter"] = named
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file with these settings; the environment variable counts as in `from_kwargs`.

        Raises ConfigError naming the file.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"the configuration {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}; expected settings such as `model: ...`")
        return cls.from_kwargs(**content)

    @model_validator(mode="before")
    @classmethod
    def _understand_lightx2v(cls, settings: Any) -> Any:
        return in_guides_words(settings) if isinstance(settings, dict) else settings

    @model_validator(mode="before")
    @classmethod
    def _inject_model_type(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and isinstance(settings.get("cache_config"), Mapping):
            name = settings.get("model_class_name")
            inside = dict(settings["cache_config"])
            if inside.get("model_type") is None and name is not None:
                inside["model_type"] = name
            settings = {**settings, "cache_config": inside}
        return settings

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if self.cache_adapter not in CACHE_ADAPTERS:
            raise ValueError(f"cache_adapter: found {self.cache_adapter!r}; expected {' or '.join(CACHE_ADAPTERS)}")
        model_type = None if self.cache_config is None else self.cache_config.model_type
        if model_type is not None and self.model_class_name not in (None, model_type):
            raise ValueError(
                f"cache_config.model_type is {model_type!r} and model_class_name is {self.model_class_name!r}; they "
                "must be the same: leave model_type out"
            )
        return self


class Omni:
    """A pipeline with its cache, ready to generate.

    Args:
        config: model and cache.
        pipeline: a loaded pipeline to use instead of loading `config.model`.

    Attributes:
        pipeline: the diffusers pipeline.
        settings: of the cache; None without one.

    Raises ModelError for the checkpoint, StepCacheError where the cache does not know the model.
    """

    def __init__(self, config: OmniDiffusionConfig, pipeline: Any = None) -> None:
        self.config = config
        self.pipeline = _load(config) if pipeline is None else pipeline
        self.settings = (config.cache_config or TeaCacheConfig()) if config.cache_adapter == "tea_cache" else None
        if self.settings is not None:  # found out now rather than at the first picture
            adapter = TeaCacheAdapter(self.settings)
            adapter.apply(self.pipeline)
            adapter.remove(self.pipeline)
        elif config.cache_config is not None and "cache_adapter" not in config.model_fields_set:
            logger.warning("cache_config is given, but no cache: set cache_adapter to tea_cache to use it")
        self.trace = Trace()
        """What the caches did in the last call of `generate`."""

    def generate(
        self,
        prompt: Any = None,
        num_inference_steps: int | None = None,
        use_image_kv_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Call the pipeline and return what it returns; `.images` holds the pictures.

        The state of the caches belongs to this call: nothing of it is left afterwards, also on an exception.

        Args:
            prompt, num_inference_steps: as the pipeline takes them; the steps of `cache_config` (LightX2V's
                `infer_steps`) when left out.
            use_image_kv_cache: for this call; as the configuration says when left out.
            options: further arguments of the pipeline: `image`, `generator`, `true_cfg_scale`, ...
        """
        if num_inference_steps is None and self.settings is not None:
            num_inference_steps = self.settings.num_inference_steps
        if num_inference_steps is not None:
            options["num_inference_steps"] = num_inference_steps
        wanted = self.config.use_image_kv_cache if use_image_kv_cache is None else use_image_kv_cache
        kept = self.config.reference_kv if wanted else None
        with cached(self.pipeline, self.settings, kept) as trace, torch.no_grad():
            outputs = self.pipeline(prompt=prompt, **options)
        self.trace = trace
        return outputs


def _load(config: OmniDiffusionConfig) -> Any:
    found = str(model_index(config.model).get("_class_name"))
    if config.model_class_name not in (None, found):
        raise ModelError(
            f"model_class_name is {config.model_class_name!r}, but {config.model!r} is a {found}; "
            "leave model_class_name out, or name the right one"
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    family = next((one for one in FAMILIES.values() if one.pipeline_class_name == found), None)
    if family is not None:
        return family.load_pipeline(config.model, component_names(config.model), dtype, device)
    return load_components(found, config.model, component_names(config.model), dtype, device)
