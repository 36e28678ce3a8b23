"""Small transformers of the real classes and denoising loops, for tests of the sampling caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CHANNELS = 8  # latent channels of a packed token
TEXT_WIDTH = 12


def enliven(module: nn.Module, seed: int = 0) -> Any:
    """Weights of unit gain and sharp attention: fresh ones barely act on their input, and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if "norm_" in name and weight.ndim == 1 and ("norm_q" in name or "norm_k" in name or "norm_added" in name):
            weight.data.fill_(2.0)
        elif weight.ndim == 2:
            weight.data.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.data.normal_(0, 0.3, generator=generator)
    return module.eval().requires_grad_(False)


def qwen_transformer(zero_cond_t: bool = False, layers: int = 3, seed: int = 0) -> Any:
    """A Qwen-Image transformer of width 32."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS // 4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    return enliven(model, seed)


def flux_transformer(guidance: bool = True, seed: int = 0) -> Any:
    """A FLUX.1 transformer of width 32: two dual-stream and two single-stream blocks."""
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=6,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return enliven(model, seed)


class Pipeline:
    """As much of a diffusers pipeline as the caches look at: a transformer and a real scheduler."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler()


@dataclass(frozen=True)
class Edit:
    """One request: pictures (frames, height, width) in tokens, the noise first, and words for each CFG branch."""

    shapes: tuple[tuple[int, int, int], ...] = ((1, 4, 4), (1, 6, 4))
    batch: int = 1
    text_tokens: int = 5
    masked: bool = False
    branches: tuple[str, ...] = ("cond",)
    seed: int = 0
    dtype: torch.dtype = torch.float32
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def noise(self) -> int:
        return prod(self.shapes[0])

    @property
    def reference(self) -> int:
        return sum(prod(shape) for shape in self.shapes[1:])

    def _random(self, salt: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def latents(self) -> torch.Tensor:
        return self._random(1, self.batch, self.noise, CHANNELS)

    def references(self) -> torch.Tensor:
        return self._random(2, self.batch, self.reference, CHANNELS)

    def kwargs(self, latents: torch.Tensor, t: float, branch: str = "cond") -> dict[str, Any]:
        """Arguments of the transformer's forward; `latents` `(B, N, C)`, t in (0, 1]."""
        salt = 3 + len(branch)
        mask = torch.ones(self.batch, self.text_tokens, dtype=torch.bool)
        mask[0, -2:] = False
        return {
            "hidden_states": torch.cat([latents, self.references()], dim=1),
            "timestep": torch.full((self.batch,), t, dtype=self.dtype),
            "encoder_hidden_states": self._random(salt, self.batch, self.text_tokens, TEXT_WIDTH),
            "encoder_hidden_states_mask": mask if self.masked else None,
            "img_shapes": [list(self.shapes)] * self.batch,
            "return_dict": False,
            **self.extra,
        }

    def with_seed(self, seed: int) -> Edit:
        return replace(self, seed=seed)


EDIT = Edit()
EDITS = {
    "plain": EDIT,
    "text mask": replace(EDIT, masked=True),
    "batch of 2": replace(EDIT, batch=2, masked=True),
    "two references": replace(EDIT, shapes=((1, 4, 4), (1, 8, 6), (1, 2, 2))),
}


def sigmas(steps: int) -> list[float]:
    """From 1 down, as a flow-matching scheduler's; exact in binary, so that sums of steps are too."""
    return [1.0 - step / steps for step in range(steps)]


def velocities(
    model: Any, edit: Edit, steps: int, *, feed: bool = False, stop: int | None = None
) -> dict[str, list[torch.Tensor]]:
    """Denoise with a bare transformer; what it returned, branch by branch and step by step, noise tokens only.

    The latents move on a path of their own, so that a step's input does not depend on what a cache did before;
    with `feed` they follow the mean velocity of the branches. `stop` breaks off after so many steps.
    """
    found: dict[str, list[torch.Tensor]] = {branch: [] for branch in edit.branches}
    latents, drift = edit.latents(), edit.with_seed(edit.seed + 50).latents()
    for step, t in enumerate(sigmas(steps)[:stop]):
        outputs = []
        for branch in edit.branches:
            with model.cache_context(branch) if branch else nullcontext(), torch.no_grad():
                output = model(**edit.kwargs(latents, t, branch))[0][:, : edit.noise]
            found[branch].append(output)
            outputs.append(output)
        move = torch.stack(outputs).mean(0) if feed else drift * (1 + step % 3)
        latents = latents - move / steps
    return found


def equal(first: dict[str, list[torch.Tensor]], second: dict[str, list[torch.Tensor]]) -> bool:
    """Whether two denoising runs returned the same, bit for bit."""
    assert first.keys() == second.keys()
    return all(
        len(first[branch]) == len(second[branch])
        and all(torch.equal(one, other) for one, other in zip(first[branch], second[branch], strict=True))
        for branch in first
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the 2-norm."""
    return float((found - expected).norm() / expected.norm())


@contextmanager
def counted(modules: Sequence[nn.Module]) -> Iterator[list[str]]:
    """The class names of those `modules` that run within the block, in order."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.append(type(module).__name__)) for module in modules
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


class DeviceReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host: each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def fail_in(module: nn.Module, times: int = 1) -> Any:
    """Makes `module` raise RuntimeError("injected") the next `times` times that it runs; returns the handle."""
    left = [times]

    def explode(*_: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("injected")

    return module.register_forward_pre_hook(explode)
