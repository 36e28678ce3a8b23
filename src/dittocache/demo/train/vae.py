"""Stage `vae`: train the autoencoder on drawn pictures, then measure its latents' mean and standard deviation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from torch.nn import functional as F

from dittocache.demo.edits import new_edit, training_edits
from dittocache.demo.scenes import draw
from dittocache.demo.train.assemble import save_module
from dittocache.demo.train.configs import build_vae
from dittocache.demo.train.muon import Muon
from dittocache.demo.train.plane import decode, encode_mean, from_plane, to_plane
from dittocache.demo.train.run import Budget, Log, load_checkpoint, save_checkpoint, to_tensor

BATCH = 8
SIGMA = 0.08  # fixed width of the posterior; a learned one stalls at this size
PENALTY = 1e-3  # on the squared latents, in place of the KL term
MUON_RATE, ADAM_RATE = 4e-3, 2e-3


class PictureStream:
    """Endless random pictures of the task: targets of every kind, sources and blueprints."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seed = random.Random(seed), seed

    def batch(self, size: int) -> torch.Tensor:
        """Return (size, 3, 128, 128) in [-1, 1]."""
        self.seed += 1
        edits = training_edits(size, seed=self.rng.randrange(2**31), edits_per_scene=1)
        scenes = [edit.source if i % 4 == 0 else edit.target for i, edit in enumerate(edits)]
        scenes[-1] = new_edit(edits[-1].source).target if self.seed % 2 else scenes[-1]
        return to_tensor([draw(scene) for scene in scenes])


def train_vae(work_dir: Path, model_dir: Path, minutes: float, device: str = "cpu", compiled: bool = True) -> None:
    """Train for `minutes` (earlier runs counted), save to `model_dir/vae`. Resumes from its checkpoint."""
    torch.manual_seed(0)
    log = Log(work_dir / "log.jsonl", "vae")
    plane = to_plane(build_vae()).to(device)
    for module in plane.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for p in plane.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim == 4 and min(p.shape[0], p.shape[1]) >= 16]
    kernel_ids = {id(p) for p in kernels}
    muon = Muon(kernels)
    adam = torch.optim.AdamW([p for p in trained if id(p) not in kernel_ids], betas=(0.9, 0.98), weight_decay=0.0)
    step, spent = 0, 0.0
    checkpoint = load_checkpoint(work_dir / "vae.pt")
    if checkpoint is not None:
        plane.load_state_dict(checkpoint["model"])
        muon.load_state_dict(checkpoint["muon"])
        adam.load_state_dict(checkpoint["adam"])
        step, spent = checkpoint["step"], checkpoint["spent"]
    budget = Budget(minutes, spent)
    stream = PictureStream(seed=1 + step)
    check = PictureStream(seed=0).batch(16).to(device)

    def reconstruct(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = encode_mean(plane, images)
        return decode(plane, latents + SIGMA * noise), latents

    forward = torch.compile(reconstruct, dynamic=False) if compiled else reconstruct

    def save() -> None:
        state = {"model": plane.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
        save_checkpoint(work_dir / "vae.pt", state | {"step": step, "spent": budget.spent})

    while budget.fraction < 1.0:
        images = stream.batch(BATCH).to(device)
        with torch.autocast(device, torch.bfloat16):
            rebuilt, latents = forward(images, torch.randn(BATCH, 16, 16, 16, device=device))
        difference = rebuilt.float() - images
        loss = difference.abs().mean() + 4.0 * difference.square().mean()
        loss = loss + PENALTY * latents.float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        rate = budget.rate()
        nn.utils.clip_grad_norm_([p for p in trained if id(p) not in kernel_ids], 1.0)
        muon.step(MUON_RATE * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        for parameter in trained:
            parameter.grad = None
        step += 1
        if step % 25 == 0:
            log.write(step=step, loss=round(float(loss.detach()), 5), rate=round(rate, 3))
        if step % 100 == 0:
            log.write(step=step, psnr=round(reconstruction_psnr(plane, check), 2), **_scale(plane, check))
            save()
    save()
    finish_vae(plane, model_dir, log)


@torch.no_grad()
def _scale(plane: AutoencoderKLQwenImage, images: torch.Tensor) -> dict[str, float]:
    return {"latent_rms": round(float(encode_mean(plane, images).square().mean().sqrt()), 3)}


@torch.no_grad()
def reconstruction_psnr(plane: AutoencoderKLQwenImage, images: torch.Tensor) -> float:
    """Mean PSNR in dB over images (B, 3, 128, 128), clamped and without noise, as the pipeline decodes."""
    rebuilt = decode(plane, encode_mean(plane, images)).clamp(-1, 1)
    errors = F.mse_loss(rebuilt / 2, images / 2, reduction="none").mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(errors)).mean())


@torch.no_grad()
def finish_vae(plane: AutoencoderKLQwenImage, model_dir: Path, log: Log) -> None:
    """Measure the latents' statistics, write them into the configuration and save the stock VAE."""
    stream = PictureStream(seed=10_000)
    latents = torch.cat([encode_mean(plane, stream.batch(32).to(plane.device)) for _ in range(12)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae = from_plane(plane.to("cpu"))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    # The pipelines take the posterior's mode; its width is stated all the same, as it was in training.
    vae.quant_conv.weight[16:] = 0.0
    vae.quant_conv.bias[16:] = 2 * math.log(SIGMA)
    save_module(vae, model_dir / "vae")
    log.write(psnr=round(reconstruction_psnr(plane, stream.batch(64)), 2), latents_std=deviation.tolist())
