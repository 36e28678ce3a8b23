"""A LoRA that was trained with isolated references, loaded as diffusers does: the cache sees it in the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.referencekv.cached_steps import edited

from dittocache import ReferenceKVConfig, cached, isolate_references
from dittocache.demo.tiny import tiny_pipeline
from dittocache.errors import ReferenceCacheError
from dittocache.families.denoiser import is_isolated
from dittocache.families.registry import get_family
from dittocache.referencekv.rules import lora_visibility
from dittocache.sampling.session import NOT_ISOLATED
from dittocache.training.config import TrainConfig
from dittocache.training.lora import add_lora, save_lora

FAMILY = "qwen-image-edit-plus"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each visibility, by what it was trained with; both change the picture."""
    folders = {}
    for visibility in ("isolated", "full"):
        transformer = tiny_pipeline(FAMILY).transformer
        settings = TrainConfig.model_validate({"rank": 2, "reference_visibility": visibility})
        for parameter in add_lora(transformer, get_family(FAMILY), settings):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        folders[visibility] = tmp_path_factory.mktemp(visibility)
        save_lora(transformer, get_family(FAMILY), folders[visibility], {})
    return folders


def test_loaded_by_hand_it_is_exact(loras: dict[str, Path]) -> None:
    pipe = tiny_pipeline(FAMILY)
    pipe.load_lora_weights(loras["isolated"])
    with isolate_references(pipe):
        expected = edited(pipe)
    assert not torch.equal(edited(pipe), expected)  # full visibility makes other pictures
    with cached(pipe, reference_kv=ReferenceKVConfig(mode="exact")) as trace:
        assert torch.equal(edited(pipe), expected)
    assert trace.references_reused == 3
    assert not is_isolated(pipe.transformer)


def test_any_lora_at_work_counts_and_no_other(loras: dict[str, Path]) -> None:
    pipe = tiny_pipeline(FAMILY)
    assert lora_visibility(pipe.transformer) is None
    pipe.load_lora_weights(loras["full"], adapter_name="style")
    assert lora_visibility(pipe.transformer) is None
    pipe.load_lora_weights(loras["isolated"], adapter_name="exact")
    pipe.set_adapters(["style", "exact"])
    assert lora_visibility(pipe.transformer) == "isolated"
    pipe.disable_lora()
    assert lora_visibility(pipe.transformer) is None
    pipe.enable_lora()
    pipe.set_adapters(["style", "exact"], [1.0, 0.0])
    assert lora_visibility(pipe.transformer) is None
    pipe.set_adapters(["exact"])
    pipe.fuse_lora(adapter_names=["exact"])
    assert lora_visibility(pipe.transformer) == "isolated"
    pipe.unfuse_lora()
    pipe.set_adapters(["style"])
    assert lora_visibility(pipe.transformer) is None
    with pytest.raises(ReferenceCacheError, match="nor an active LoRA says that it was trained otherwise"):
        cached(pipe, reference_kv=ReferenceKVConfig(mode="exact")).__enter__()
    pipe.unload_lora_weights()
    assert lora_visibility(pipe.transformer) is None


def test_loaded_or_unloaded_while_the_cache_is_on_is_an_error(loras: dict[str, Path]) -> None:
    pipe = tiny_pipeline(FAMILY)
    with cached(pipe, reference_kv=ReferenceKVConfig()):
        pipe.load_lora_weights(loras["isolated"])
        with pytest.raises(ReferenceCacheError, match=r"was trained with isolated references .* take the .* on again"):
            edited(pipe)
    with cached(pipe, reference_kv=ReferenceKVConfig()):
        edited(pipe)
        pipe.unload_lora_weights()
        with pytest.raises(ReferenceCacheError, match="isolated for a LoRA that is active no longer"):
            edited(pipe)
    edited(pipe)


def test_a_checkpoint_that_was_trained_so_stays_so_without_its_lora(loras: dict[str, Path]) -> None:
    pipe = tiny_pipeline(FAMILY)
    pipe.transformer.register_to_config(reference_visibility="isolated")
    pipe.load_lora_weights(loras["isolated"])
    with cached(pipe, reference_kv=ReferenceKVConfig()) as trace:
        pipe.unload_lora_weights()
        edited(pipe)
    assert trace.references_reused == 3


def test_approximation_may_be_asked_for(loras: dict[str, Path]) -> None:
    pipe = tiny_pipeline(FAMILY)
    pipe.load_lora_weights(loras["isolated"])
    with cached(pipe, reference_kv=ReferenceKVConfig(mode="approx", refresh=2)) as trace:
        edited(pipe)
    assert trace.references_reused == 2
    assert trace.notes == [NOT_ISOLATED]
    with isolate_references(pipe), cached(pipe) as trace:
        edited(pipe)
    assert trace.notes == []
