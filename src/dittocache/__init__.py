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
    from dittocache.errors import CacheError as CacheError
    from dittocache.errors import ConfigError as ConfigError
    from dittocache.errors import DataError as DataError
    from dittocache.errors import DittocacheError as DittocacheError
    from dittocache.errors import ModelError as ModelError
    from dittocache.errors import ReferenceCacheError as ReferenceCacheError
    from dittocache.errors import StageError as StageError
    from dittocache.errors import StepCacheError as StepCacheError
    from dittocache.quality.metrics import psnr as psnr
    from dittocache.quality.metrics import ssim as ssim
    from dittocache.referencekv.config import ReferenceKVConfig as ReferenceKVConfig
    from dittocache.sampling.config import GenerateConfig as GenerateConfig
    from dittocache.sampling.generate import generate as generate
    from dittocache.sampling.session import cached as cached
    from dittocache.sampling.trace import Trace as Trace
    from dittocache.teacache.config import TeaCacheConfig as TeaCacheConfig

__version__ = "0.1.0"

_HOMES = {
    "CacheError": "dittocache.errors",
    "ConfigError": "dittocache.errors",
    "DataError": "dittocache.errors",
    "DittocacheError": "dittocache.errors",
    "GenerateConfig": "dittocache.sampling.config",
    "ModelError": "dittocache.errors",
    "ReferenceCacheError": "dittocache.errors",
    "ReferenceKVConfig": "dittocache.referencekv.config",
    "RunConfig": "dittocache.config",
    "StageError": "dittocache.errors",
    "StepCacheError": "dittocache.errors",
    "TeaCacheConfig": "dittocache.teacache.config",
    "Trace": "dittocache.sampling.trace",
    "cached": "dittocache.sampling.session",
    "generate": "dittocache.sampling.generate",
    "load_config": "dittocache.config",
    "psnr": "dittocache.quality.metrics",
    "ssim": "dittocache.quality.metrics",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dittocache' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
