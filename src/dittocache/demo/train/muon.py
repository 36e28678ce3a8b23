"""Muon for matrices and convolution kernels, its Newton-Schulz step batched over equal shapes.

`torch.optim.Muon` takes 2-D parameters only and steps them one by one; here a kernel (out, in, h, w) counts as the
matrix (out, in * h * w), and the many small matrices of one shape are orthogonalised by one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

# Quintic coefficients of Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Bring the singular values of (B, rows, columns) matrices near 1 by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()  # half the time on CPUs that multiply bfloat16
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT  # (B, short, short)
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result.float()


class Muon:
    """Momentum, orthogonalised, with AdamW-like update size; shards its work over ranks where there are several."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            flat = parameter.flatten(1)
            self.groups[(flat.shape[0], flat.shape[1])].append(parameter)
        self.buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter in place; `lr` is on AdamW's scale (root-mean-square update 0.2 * lr per entry)."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for (rows, columns), group in self.groups.items():
            gradient = torch.stack([p.grad.flatten(1) for p in group])  # type: ignore[union-attr]
            buffer = self.buffers[(rows, columns)]
            buffer.lerp_(gradient, 1 - self.momentum)
            nesterov = gradient.lerp_(buffer, self.momentum)
            if world == 1:
                update = orthogonalise(nesterov)
            else:
                update = torch.zeros_like(nesterov)
                update[rank::world] = orthogonalise(nesterov[rank::world])
                dist.all_reduce(update)
            scale = 0.2 * max(rows, columns) ** 0.5  # Liu et al. 2025, "Muon is scalable for LLM training", eq. 4
            for parameter, one in zip(group, update, strict=True):
                parameter.mul_(1 - lr * self.weight_decay)
                parameter.add_(one.view_as(parameter), alpha=-lr * scale)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the momentum buffers, one (count, rows, columns) tensor a shape."""
        return {f"{rows}x{columns}": buffer for (rows, columns), buffer in self.buffers.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the momentum buffers."""
        for (rows, columns), buffer in self.buffers.items():
            buffer.copy_(state[f"{rows}x{columns}"])
