"""The published checkpoints by their architecture: folders that hold configurations and no weights."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What differs from the defaults of the diffusers classes, which are those of Qwen-Image (60 layers, 24 heads of 128,
# prompts 3584 wide) and FLUX.1 (19 and 38 layers, 24 heads of 128, prompts 4096 wide, pooled 768).
DIFFERENCES: dict[str, dict[str, Any]] = {
    "qwen-image": {},
    "qwen-image-edit": {},
    "qwen-image-edit-plus": {"zero_cond_t": True},
    "flux": {"guidance_embeds": True},
    "flux-kontext": {"guidance_embeds": True},
}

# Parameters of what encodes, from the files of the checkpoints: the VAE, and the largest text encoder.
ENCODERS = {"qwen-image": 8_292_166_656, "flux": 4_762_310_656}  # Qwen2.5-VL 7B; the encoder of T5-XXL

REFERENCES = {"qwen-image": 0, "qwen-image-edit": 1, "qwen-image-edit-plus": 2, "flux": 0, "flux-kontext": 1}
"""Control pictures of a sample that the shipped configs are made for."""

# Text tokens of a long prompt, with the tokens of the pictures that the text encoder sees.
TEXT_TOKENS = {
    "qwen-image": 512,
    "qwen-image-edit": 1536,
    "qwen-image-edit-plus": 1024,
    "flux": 512,
    "flux-kontext": 512,
}


def transformer_folder(folder: Path, family_name: str, class_name: str) -> Path:
    """A checkpoint's folder with the transformer's config alone; return it."""
    with init_empty_weights():
        transformer = getattr(diffusers, class_name)(**DIFFERENCES[family_name])
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(transformer.to_json_string())
    return folder


def vae_of(family_name: str) -> Any:
    """The VAE of a published checkpoint in bfloat16, without storage."""
    with init_empty_weights():
        if family_name.startswith("qwen"):
            return diffusers.AutoencoderKLQwenImage().bfloat16()
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).bfloat16()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, 0)
        self.peak = max(self.peak, sum(self._alive.values()))
        return made
