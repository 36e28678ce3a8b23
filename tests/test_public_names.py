"""The one public door: what is exported, that it exists, and that opening it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dittocache

EXPORTED = [
    "CacheContext",
    "CacheError",
    "CachedBatches",
    "CachedDataset",
    "CachedSamples",
    "ConfigError",
    "DataError",
    "DittocacheError",
    "EXTRACTOR_REGISTRY",
    "EmbeddingCacheManager",
    "GenerateConfig",
    "Manifest",
    "ModelError",
    "Omni",
    "OmniDiffusionConfig",
    "RecordCorruptError",
    "RecordMissingError",
    "ReferenceCacheError",
    "ReferenceKVConfig",
    "RunConfig",
    "StageError",
    "StepCacheError",
    "Store",
    "StoreUnavailableError",
    "TeaCacheAdapter",
    "TeaCacheConfig",
    "Trace",
    "cached",
    "check_cache_exists",
    "clear_image_token_caches",
    "disable_image_kv_cache",
    "enable_image_kv_cache",
    "generate",
    "get_extractor",
    "isolate_references",
    "load_config",
    "psnr",
    "register_extractor",
    "request",
    "set_image_token_cache_enabled",
    "setup_cache",
    "ssim",
]


def test_the_exported_names() -> None:
    assert dittocache.__all__ == EXPORTED
    assert sorted(dittocache.__all__) == dittocache.__all__


@pytest.mark.parametrize("name", EXPORTED)
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(dittocache, name)
    assert value.__doc__
    assert name in dir(dittocache)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'cahced'; it has .*cached"):
        dittocache.cahced  # noqa: B018


def test_importing_loads_neither_torch_nor_diffusers() -> None:
    program = (
        "import sys, dittocache, dittocache.config\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert ended.stdout.strip() == "[]"


def test_types_are_shipped() -> None:
    assert (Path(dittocache.__file__).parent / "py.typed").is_file()
