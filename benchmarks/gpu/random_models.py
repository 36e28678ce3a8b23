"""Checkpoints of the real sizes whose weights are random and made where they are used, in seconds: nothing to download.

A checkpoint here is a folder with everything but the large weights: configurations, tokenizers, processor, scheduler.
`RandomWeights` stands before a family and builds a component's weights when a pipeline is asked for; all else is the
library's own way from a folder to training.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dittocache.demo.tiny import save_tiny
from dittocache.families.base import Family
from dittocache.families.loading import component_names, diffusers_class, model_index

# What the published checkpoints have, by the component's class; what is not named stays as in the tiny model.
# None leaves a setting to the class, which derives it.
REAL_SIZES: Mapping[str, Mapping[str, Any]] = {
    "QwenImageTransformer2DModel": {
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    },
    "AutoencoderKLQwenImage": {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "Qwen2_5_VLForConditionalGeneration": {
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "layer_types": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "FluxTransformer2DModel": {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    },
    "AutoencoderKL": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
    "CLIPTextModel": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "T5EncoderModel": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": None,
        "is_gated_act": None,
    },
}
REAL_PROCESSOR = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
POOL = 10_000_019  # random numbers that all weights are cut from; a prime, so that no two rows are the same


def make_checkpoint(folder: Path, family_name: str, tiny: bool) -> Path:
    """Write the folder of a checkpoint without its transformer's weights; `tiny` keeps the sizes of the tests' models.

    The tiny weights of the encoders stay in it: they stand for the random ones in the keys of cached records.
    """
    save_tiny(folder, family_name)
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    if tiny:
        return folder
    for name, entry in model_index(folder).items():
        if isinstance(entry, list | tuple) and entry[1] in REAL_SIZES:
            _change(folder / name / "config.json", REAL_SIZES[entry[1]])
    processor = folder / "processor/preprocessor_config.json"
    if processor.exists():
        _change(processor, REAL_PROCESSOR)
    return folder


class RandomWeights:
    """The family `inner`, with random weights for the checkpoints of `make_checkpoint`.

    Attributes:
        seconds_building: spent on making weights so far, which no real training does.
    """

    def __init__(self, inner: Family) -> None:
        self._inner = inner
        self.seconds_building = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A pipeline with `components` only, as the family's own, but with random weights."""
        started = time.perf_counter()
        index = model_index(model)
        weighty = [name for name in component_names(model) if name in components and _has_weights(model, name)]
        beside = self._inner.load_pipeline(model, sorted(set(components) - set(weighty)), dtype, "cpu").components
        built = {name: build(Path(model) / name, index[name], dtype, device) for name in weighty}
        pipe = diffusers_class(self._inner.pipeline_class_name)(**{**beside, **built})
        pipe.set_progress_bar_config(disable=True)
        self.seconds_building += time.perf_counter() - started
        return pipe


def build(folder: Path, entry: tuple[str, str], dtype: torch.dtype, device: str | torch.device) -> torch.nn.Module:
    """A component of the class `entry` (library, class) from its configuration, with random weights on `device`."""
    from accelerate import init_empty_weights

    component: Any
    # Weights alone are left out: buffers, such as the frequencies of position embeddings, are computed as usual.
    with init_empty_weights(include_buffers=False):
        component = empty_component(folder, entry)
    materialise(component, dtype, device)
    if hasattr(component, "tie_weights"):
        component.tie_weights()
    return component.requires_grad_(False).eval()  # type: ignore[no-any-return]


def empty_component(folder: Path, entry: tuple[str, str]) -> Any:
    """A component made from its `config.json`."""
    library, class_name = entry
    if library == "diffusers":
        component_class = diffusers_class(class_name)
        return component_class.from_config(component_class.load_config(str(folder)))
    import transformers

    component_class = getattr(transformers, class_name)
    return component_class(component_class.config_class.from_pretrained(str(folder)))


def materialise(module: torch.nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give every parameter storage: matrices of unit gain, norms 1, biases 0; the same values on every device."""
    pool = random_numbers().to(device, dtype)
    for prefix, part in module.named_modules():
        part._buffers = {
            name: buffer if buffer is None else buffer.to(device) for name, buffer in part._buffers.items()
        }
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if name == "bias":
                values.zero_()
            elif values.numel() == values.shape[0]:
                values.fill_(1)
            else:
                gain = parameter[0].numel() ** -0.5
                fill(values.view(-1), pool, zlib.crc32(f"{prefix}.{name}".encode()) % len(pool), gain)
            part._parameters[name] = torch.nn.Parameter(values, requires_grad=False)


@cache
def random_numbers() -> torch.Tensor:
    """`POOL` normal random numbers, on the CPU."""
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0))


def fill(values: torch.Tensor, pool: torch.Tensor, start: int, gain: float) -> None:
    """Copy `pool` times `gain` into the flat `values`, from `start` on and round again as often as it takes."""
    done = 0
    while done < len(values):
        piece = pool[start : start + len(values) - done]
        torch.mul(piece, gain, out=values[done : done + len(piece)])
        done, start = done + len(piece), 0


def _has_weights(model: str, name: str) -> bool:
    return (Path(model) / name / "config.json").exists()


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    """Put `changes` into a JSON file, section by section; None removes a setting."""
    content = json.loads(path.read_text())
    _merge(content, changes)
    path.write_text(json.dumps(content, indent=2))


def _merge(content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if value is None:
            content.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(content.get(name), dict):
            _merge(content[name], value)
        else:
            content[name] = value
