"""dittocache: compute once, reuse everywhere, around Qwen-Image-family diffusion transformers.

Everything public is importable from here. Rooms are loaded when a name is first used, so that `import dittocache` costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dittocache.config import RunConfig as RunConfig
    from dittocache.config import load_config as load_config
    from dittocache.embeddings.manager import EmbeddingCacheManager as EmbeddingCacheManager
    from dittocache.embeddings.manager import check_cache_exists as check_cache_exists
    from dittocache.embeddings.planning.manifest import Manifest as Manifest
    from dittocache.embeddings.reading.dataset import CachedDataset as CachedDataset
    from dittocache.embeddings.reading.reader import CachedBatches as CachedBatches
    from dittocache.embeddings.reading.reader import CachedSamples as CachedSamples
    from dittocache.embeddings.store.store import Store as Store
    from dittocache.errors import CacheError as CacheError
    from dittocache.errors import ConfigError as ConfigError
    from dittocache.errors import DataError as DataError
    from dittocache.errors import DittocacheError as DittocacheError
    from dittocache.errors import ModelError as ModelError
    from dittocache.errors import RecordCorruptError as RecordCorruptError
    from dittocache.errors import RecordMissingError as RecordMissingError
    from dittocache.errors import ReferenceCacheError as ReferenceCacheError
    from dittocache.errors import StageError as StageError
    from dittocache.errors import StepCacheError as StepCacheError
    from dittocache.errors import StoreUnavailableError as StoreUnavailableError
    from dittocache.families.run_clock import request as request
    from dittocache.families.transformer_side import CacheContext as CacheContext
    from dittocache.quality.metrics import psnr as psnr
    from dittocache.quality.metrics import ssim as ssim
    from dittocache.referencekv.config import ReferenceKVConfig as ReferenceKVConfig
    from dittocache.referencekv.isolation import isolate_references as isolate_references
    from dittocache.referencekv.switch import clear_image_token_caches as clear_image_token_caches
    from dittocache.referencekv.switch import disable_image_kv_cache as disable_image_kv_cache
    from dittocache.referencekv.switch import enable_image_kv_cache as enable_image_kv_cache
    from dittocache.referencekv.switch import set_image_token_cache_enabled as set_image_token_cache_enabled
    from dittocache.sampling.config import GenerateConfig as GenerateConfig
    from dittocache.sampling.generate import generate as generate
    from dittocache.sampling.omni import Omni as Omni
    from dittocache.sampling.omni import OmniDiffusionConfig as OmniDiffusionConfig
    from dittocache.sampling.session import cached as cached
    from dittocache.sampling.trace import Trace as Trace
    from dittocache.teacache.adapter import TeaCacheAdapter as TeaCacheAdapter
    from dittocache.teacache.apply import setup_cache as setup_cache
    from dittocache.teacache.config import TeaCacheConfig as TeaCacheConfig
    from dittocache.teacache.extractors import EXTRACTOR_REGISTRY as EXTRACTOR_REGISTRY
    from dittocache.teacache.extractors import get_extractor as get_extractor
    from dittocache.teacache.extractors import register_extractor as register_extractor

__version__ = "0.1.0"

_HOMES = {
    "CacheContext": "dittocache.families.transformer_side",
    "CacheError": "dittocache.errors",
    "CachedBatches": "dittocache.embeddings.reading.reader",
    "CachedDataset": "dittocache.embeddings.reading.dataset",
    "CachedSamples": "dittocache.embeddings.reading.reader",
    "ConfigError": "dittocache.errors",
    "DataError": "dittocache.errors",
    "DittocacheError": "dittocache.errors",
    "EXTRACTOR_REGISTRY": "dittocache.teacache.extractors",
    "EmbeddingCacheManager": "dittocache.embeddings.manager",
    "GenerateConfig": "dittocache.sampling.config",
    "Manifest": "dittocache.embeddings.planning.manifest",
    "ModelError": "dittocache.errors",
    "RecordCorruptError": "dittocache.errors",
    "RecordMissingError": "dittocache.errors",
    "Omni": "dittocache.sampling.omni",
    "OmniDiffusionConfig": "dittocache.sampling.omni",
    "ReferenceCacheError": "dittocache.errors",
    "ReferenceKVConfig": "dittocache.referencekv.config",
    "RunConfig": "dittocache.config",
    "StageError": "dittocache.errors",
    "StepCacheError": "dittocache.errors",
    "Store": "dittocache.embeddings.store.store",
    "StoreUnavailableError": "dittocache.errors",
    "TeaCacheAdapter": "dittocache.teacache.adapter",
    "TeaCacheConfig": "dittocache.teacache.config",
    "Trace": "dittocache.sampling.trace",
    "cached": "dittocache.sampling.session",
    "check_cache_exists": "dittocache.embeddings.manager",
    "clear_image_token_caches": "dittocache.referencekv.switch",
    "disable_image_kv_cache": "dittocache.referencekv.switch",
    "enable_image_kv_cache": "dittocache.referencekv.switch",
    "generate": "dittocache.sampling.generate",
    "get_extractor": "dittocache.teacache.extractors",
    "isolate_references": "dittocache.referencekv.isolation",
    "load_config": "dittocache.config",
    "psnr": "dittocache.quality.metrics",
    "register_extractor": "dittocache.teacache.extractors",
    "request": "dittocache.families.run_clock",
    "set_image_token_cache_enabled": "dittocache.referencekv.switch",
    "setup_cache": "dittocache.teacache.apply",
    "ssim": "dittocache.quality.metrics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dittocache' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
