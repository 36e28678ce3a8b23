"""Train the one-frame VAE as 2-D convolutions: the same numbers, a third of the work.

A causal 3-D convolution that sees a single frame multiplies zeros with every temporal tap but the last.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import nn

from dittocache.demo.train.configs import build_vae


class PlaneConv(nn.Conv2d):
    """A 2-D convolution that takes and gives (B, C, 1, H, W), in place of a causal 3-D one."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve the only frame; the feature cache of earlier frames is never needed."""
        return super().forward(x[:, :, 0]).unsqueeze(2)


def _children(root: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in root.modules() for name, child in parent.named_children()]


def to_plane(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Replace, in place, the causal 3-D convolutions by 2-D ones that hold the last temporal tap.

    `encoder` and `decoder` then serve single frames only, called without a feature cache.
    """
    for parent, name, child in _children(vae):
        if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
            _, height, width = child.kernel_size
            plane = PlaneConv(child.in_channels, child.out_channels, (height, width), padding=(height // 2, width // 2))
            if child.weight.abs().sum() > 0:
                with torch.no_grad():
                    plane.weight.copy_(child.weight[:, :, -1])
                    plane.bias.copy_(child.bias)  # type: ignore[union-attr]
            setattr(parent, name, plane)
        elif name == "time_conv":
            for parameter in child.parameters():
                parameter.requires_grad_(False).zero_()
    return vae


def from_plane(plane: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Return a stock VAE of the same weights; temporal taps that one frame never reaches are zero."""
    vae = build_vae()
    vae.register_to_config(latents_mean=plane.config.latents_mean, latents_std=plane.config.latents_std)
    trained = plane.state_dict()
    with torch.no_grad():
        for name, tensor in vae.state_dict().items():
            source = trained[name]
            if source.shape == tensor.shape:
                tensor.copy_(source)
            else:
                tensor.zero_()
                tensor[:, :, -1] = source
    return vae


def encode_mean(plane: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 128, 128) in [-1, 1] to latent means (B, 16, 16, 16), not normalised."""
    moments: torch.Tensor = plane.quant_conv(plane.encoder(images.unsqueeze(2)))
    return moments[:, :16, 0]


def decode(plane: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 16, 16, 16), not normalised, to images (B, 3, 128, 128), not clamped."""
    frames: torch.Tensor = plane.decoder(plane.post_quant_conv(latents.unsqueeze(2)))  # (B, 3, 1, 128, 128)
    return frames[:, :, 0]
