"""Stage `polish`: train the VAE's decoder alone a little longer, on greys and textures, which are rare in the mix.

The encoder stays as it is, so encoded latents and a transformer trained on them stay valid.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage

from dittocache.demo.edits import new_edit, training_edits
from dittocache.demo.scenes import Scene, draw
from dittocache.demo.train.assemble import save_module
from dittocache.demo.train.muon import Muon
from dittocache.demo.train.plane import decode, encode_mean, from_plane, to_plane
from dittocache.demo.train.run import Budget, Log, to_tensor
from dittocache.demo.train.vae import BATCH, SIGMA, PictureStream, reconstruction_psnr

MUON_RATE, ADAM_RATE = 1.5e-3, 7e-4


def polish_scenes(rng: random.Random) -> list[Scene]:
    """One batch: three greys, one blueprint, the rest targets of every kind."""
    edits = training_edits(BATCH, seed=rng.randrange(2**31), edits_per_scene=1)
    grey = [replace(edit.source, look="grayscale") for edit in edits[:3]]
    return [*grey, new_edit(edits[3].source).target, *(edit.target for edit in edits[4:])]


def polish_decoder(work_dir: Path, model_dir: Path, minutes: float, compiled: bool = True) -> None:
    """Train the decoder of `model_dir/vae` for `minutes` and save it there again."""
    log = Log(work_dir / "log.jsonl", "polish")
    plane = to_plane(AutoencoderKLQwenImage.from_pretrained(model_dir / "vae", dtype=torch.float32))
    for module in plane.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plane.encoder.requires_grad_(False)
    plane.quant_conv.requires_grad_(False)
    trained = [p for p in plane.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim == 4 and min(p.shape[0], p.shape[1]) >= 16]
    rest = [p for p in trained if all(p is not k for k in kernels)]
    muon, adam = Muon(kernels), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(4711)
    check = PictureStream(seed=10_000).batch(32)
    greys = to_tensor([draw(scene) for _ in range(6) for scene in polish_scenes(rng)[:3]])

    def reconstruct(latents: torch.Tensor) -> torch.Tensor:
        return decode(plane, latents)

    forward = torch.compile(reconstruct, dynamic=False) if compiled else reconstruct
    budget, step = Budget(minutes), 0
    log.write(psnr=round(reconstruction_psnr(plane, check), 2), grey_psnr=round(reconstruction_psnr(plane, greys), 2))
    while budget.fraction < 1.0:
        images = to_tensor([draw(scene) for scene in polish_scenes(rng)])
        with torch.no_grad():
            latents = encode_mean(plane, images)
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = forward(latents + SIGMA * torch.randn_like(latents))
        difference = rebuilt.float() - images
        loss = difference.abs().mean() + 4.0 * difference.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        rate = budget.rate(warmup=0.05, hold=0.5)
        muon.step(MUON_RATE * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        for parameter in trained:
            parameter.grad = None
        step += 1
    vae = from_plane(plane)
    save_module(vae, model_dir / "vae")
    psnr, grey = reconstruction_psnr(plane, check), reconstruction_psnr(plane, greys)
    log.write(step=step, psnr=round(psnr, 2), grey_psnr=round(grey, 2))
