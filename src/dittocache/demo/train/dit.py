"""Stage `dit`: train the diffusion transformer by flow matching on the encoded edits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dittocache.demo.train.assemble import save_module
from dittocache.demo.train.configs import build_transformer
from dittocache.demo.train.dataset import Dataset
from dittocache.demo.train.encode import TEXT_LENGTH
from dittocache.demo.train.fast import TrainingForward
from dittocache.demo.train.muon import Muon
from dittocache.demo.train.run import Budget, Log, load_checkpoint, save_checkpoint

BATCH = 16  # samples a process and step
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3
EMA_DECAY = 0.998
EMPTY_SHARE = 0.1  # prompts replaced by the empty one, for classifier-free guidance
SHIFT = 5.0  # of the half of the noise levels that is drawn high, where the instruction decides the picture
EXPORT_SECONDS = 540.0
CHECK_STEPS = 250


def draw_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count,) in (0, 1): one half uniform, the other shifted towards 1."""
    u = torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)
    shifted = SHIFT * u / (1 + (SHIFT - 1) * u)
    return torch.where(torch.arange(count) % 2 == 0, u, shifted)


def velocity_loss(
    forward: TrainingForward, batch: dict[str, torch.Tensor], sigmas: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Flow-matching loss of a batch, the edited tokens weighted more; (B,) float32, one value a sample.

    x_sigma = (1 - sigma) x_0 + sigma noise and the velocity is noise - x_0 (Lipman et al. 2023; Esser et al. 2024).
    """
    clean, reference = batch["target"], batch["source"]
    noise = torch.randn(clean.shape, generator=generator)
    level = sigmas[:, None, None]
    zero_cond = torch.rand(len(clean), generator=generator) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        velocity = forward(
            (1 - level) * clean + level * noise, reference, sigmas, batch["embeds"], batch["mask"], zero_cond
        )
    errors = (velocity - (noise - clean)).square().mean(dim=-1)  # (B, 64)
    return (errors * batch["weights"]).mean(dim=1)


def split_parameters(transformer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, everything else for AdamW): attention and feed-forward weights against the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        hidden = parameter.ndim == 2 and "transformer_blocks" in name and "_mod." not in name
        (matrices if hidden else rest).append(parameter)
    return matrices, rest


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes in one flat message; a parameter without gradient counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))  # type: ignore[union-attr]
        start += parameter.numel()


def train_dit(work_dir: Path, model_dir: Path, minutes: float, rank: int = 0, world: int = 1) -> None:
    """Train for `minutes` in all, exporting the averaged weights to `model_dir/transformer` every nine minutes.

    Run it in `world` processes that have joined one gloo group, or alone. Resumes from its checkpoint; more minutes
    than before continue a finished run with the learning rate raised again to where the longer schedule has it.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same initial weights on every rank
    transformer = build_transformer()
    matrices, rest = split_parameters(transformer)
    muon, adam = Muon(matrices), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    average = [p.detach().clone() for p in transformer.parameters()]
    log = Log(work_dir / "log.jsonl", "dit")
    step, spent = 0, 0.0
    checkpoint = load_checkpoint(work_dir / "dit.pt")
    if checkpoint is not None:
        transformer.load_state_dict(checkpoint["model"])
        average = checkpoint["average"]
        muon.load_state_dict(checkpoint["muon"])
        adam.load_state_dict(checkpoint["adam"])
        step, spent = checkpoint["step"], checkpoint["spent"]
    data, heldout = Dataset.load(work_dir), Dataset.load_heldout(work_dir)
    generator = torch.Generator().manual_seed(1000 * rank + step)
    forward = TrainingForward(transformer, TEXT_LENGTH)
    budget, exported, recent = Budget(minutes, spent), spent, []
    parameters = list(transformer.parameters())
    order = data.batches(BATCH, seed=17 * rank + step)
    if rank == 0:
        log.write(edits=len(data), parameters=sum(p.numel() for p in parameters), world=world, batch=BATCH)

    def save() -> None:
        state = {"model": transformer.state_dict(), "average": average, "muon": muon.state_dict()}
        save_checkpoint(work_dir / "dit.pt", state | {"adam": adam.state_dict(), "step": step, "spent": budget.spent})

    def export() -> None:
        finished = build_transformer()
        with torch.no_grad():
            for parameter, value in zip(finished.parameters(), average, strict=True):
                parameter.copy_(value)
        save_module(finished, model_dir / "transformer")
        log.write(step=step, exported=True)

    while True:
        fraction, rate = agree(budget, hold=0.5)
        if fraction >= 1.0:
            break
        batch = data.batch(next(order), EMPTY_SHARE, generator)
        losses = velocity_loss(forward, batch, draw_sigmas(BATCH, generator), generator)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(MUON_RATE * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        for parameter in parameters:
            parameter.grad = None
        step += 1
        if rank != 0:
            continue
        recent.append(float(losses.detach().mean()))
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if step % 50 == 0:
            log.write(
                step=step, loss=round(sum(recent) / len(recent), 4), norm=round(float(norm), 3), rate=round(rate, 3)
            )
            recent = []
        if step % CHECK_STEPS == 0:
            log.write(step=step, heldout_loss=round(heldout_loss(forward, heldout), 4))
            save()
        if budget.spent - exported > EXPORT_SECONDS:
            exported = budget.spent
            export()
    if rank == 0:
        save()
        export()


def agree(budget: Budget, hold: float) -> tuple[float, float]:
    """(fraction, learning-rate factor) of rank 0, so that all ranks take the same number of steps."""
    values = torch.tensor([budget.fraction, budget.rate(hold=hold)])
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return float(values[0]), float(values[1])


@torch.no_grad()
def heldout_loss(forward: TrainingForward, heldout: Dataset) -> float:
    """Loss on the held-out edits at fixed noise and noise levels."""
    generator = torch.Generator().manual_seed(0)
    losses = [
        velocity_loss(forward, batch, draw_sigmas(BATCH, generator), generator)
        for batch in heldout.in_order(BATCH, generator)
    ]
    return float(torch.cat(losses).mean())
