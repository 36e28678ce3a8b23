"""Which family a name, a checkpoint or a transformer belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.errors import ModelError
from dittocache.families.loading import component_names
from dittocache.families.registry import FAMILIES, adapter_of, family_of_model, get_family


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_found_by_its_name(name: str) -> None:
    assert get_family(name).name == name


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(ModelError, match="did you mean 'qwen-image-edit-plus'"):
        get_family("qwen-image-edit-puls")


@pytest.mark.parametrize(
    ("tiny", "options", "expected"),
    [
        ("qwen-image", {}, "qwen-image"),
        ("qwen-image-edit", {}, "qwen-image-edit"),
        ("qwen-image-edit-plus", {}, "qwen-image-edit-plus"),
        ("qwen-image-edit-plus", {"zero_cond_t": True}, "qwen-image-edit-plus"),
        ("flux", {}, "flux"),
        ("flux", {"guidance": False}, "flux-schnell"),
        ("flux-kontext", {}, "flux-kontext"),
    ],
)
def test_a_checkpoint_tells_its_family(tiny: str, options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert family_of_model(save_tiny(tmp_path, tiny, **options)).name == expected


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no diffusers pipeline found at .*nowhere.*model_index\.json"):
        family_of_model(tmp_path / "nowhere")


def test_an_unsupported_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelError, match=r"StableDiffusionPipeline; supported .*QwenImageEditPlusPipeline"):
        family_of_model(tmp_path)


def test_the_wrong_family_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path, "flux")
    with pytest.raises(ModelError, match="is a FluxPipeline; expected a QwenImageEditPlusPipeline"):
        get_family("qwen-image-edit-plus").load_pipeline(str(tmp_path), {"vae"}, torch.float32, "cpu")


def test_an_absent_component_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "flux")
    with pytest.raises(ModelError, match="no component text_encoder_3; it lists"):
        get_family("flux").load_pipeline(str(tmp_path), {"vae", "text_encoder_3"}, torch.float32, "cpu")


def test_an_incomplete_checkpoint_is_an_error(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen-image-edit-plus")
    for file in (tmp_path / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot load vae of"):
        get_family("qwen-image-edit-plus").load_pipeline(str(tmp_path), {"vae"}, torch.float32, "cpu")


def test_a_whole_pipeline_loads_and_runs_in_the_dtype_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen-image-edit-plus")
    names = component_names(tmp_path)
    assert set(names) == {"scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"}
    pipe = get_family("qwen-image-edit-plus").load_pipeline(str(tmp_path), names, torch.bfloat16, "cpu")
    assert pipe.vae.dtype == pipe.text_encoder.dtype == pipe.transformer.dtype == torch.bfloat16


def test_a_transformer_of_no_family_is_named() -> None:
    with pytest.raises(ModelError, match="no family knows the transformer Linear; supported are Qwen"):
        adapter_of(torch.nn.Linear(1, 1))


def test_a_subclass_of_a_known_transformer_is_known() -> None:
    transformer = tiny_pipeline("qwen-image-edit-plus").transformer
    transformer.__class__ = type("MyTransformer", (type(transformer),), {})
    assert adapter_of(transformer).class_name == "QwenImageTransformer2DModel"
