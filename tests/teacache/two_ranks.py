"""One of two ranks of a context-parallel run on the CPU.

diffusers' own hooks split and gather the tokens. Its parallel attention needs an accelerator; here every rank gathers
the keys and values instead, which is the same arithmetic.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel
from diffusers.models.transformers import transformer_flux, transformer_flux2, transformer_qwenimage
from tests.denoising import EDIT, flux_transformer, qwen_transformer, sigmas, velocities
from tests.sampled_models import flux2_kwargs, flux2_transformer, latents

from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

STEPS = 8
DISTANCE = TeaCacheConfig(rel_l1_thresh=3.0, coefficients=(1.0, 0.0), num_inference_steps=STEPS)
ERROR = TeaCacheConfig(gate="error", error_tolerance=0.3, num_inference_steps=STEPS)
CONFIGS = {"distance": DISTANCE, "error": ERROR}


def split(model: Any) -> Any:
    """Each rank has half of the tokens, as after `enable_parallelism`, which needs an accelerator."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=2, mesh=mesh)
    config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh)
    model._parallel_config = SimpleNamespace(context_parallel_config=config, tensor_parallel_config=None)
    apply_context_parallel(model, config, model._cp_plan)
    for place in (transformer_flux, transformer_flux2, transformer_qwenimage):
        if place.__name__ == type(model).__module__:
            place.dispatch_attention_fn = partial(_attend, place.dispatch_attention_fn, config._flattened_mesh)
    return model


def _attend(stock: Any, mesh: Any, query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
    key, value = (EquipartitionSharder.unshard(one, 1, mesh) for one in (key, value))
    return stock(query, key, value, **kwargs)


def own_tokens(model: Any, config: TeaCacheConfig) -> tuple[str, list[float | None]]:
    """The pattern of a run in which this rank's latents move in their own way, and its distances."""
    turn = 1 if dist.get_rank() == 0 else -1
    with cached(model, config) as trace, torch.no_grad():
        for step, sigma in enumerate(sigmas(STEPS)):
            model(**EDIT.kwargs(EDIT.latents() * turn**step, sigma))
    return "".join(one.decision[0] for one in trace.steps), [one.distance for one in trace.steps]


def edit(family: str, model: Any) -> list[torch.Tensor]:
    """The velocities of a run with all tokens, noise only."""
    if family == "qwen":
        return velocities(model, EDIT_OF_EVEN_LENGTH, STEPS)["cond"]
    found = []
    with torch.no_grad():
        for step, sigma in enumerate(sigmas(STEPS)):
            if family == "flux2":
                kwargs = flux2_kwargs(latents() - 0.1 * step * latents(seed=9), sigma, "cond")
                kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :4]
                kwargs["txt_ids"] = kwargs["txt_ids"][:, :4]
                noise = 24
            else:
                from tests.teacache.test_hook import flux_kwargs

                kwargs, noise = flux_kwargs(sigma), 16
                kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :4]
                kwargs["txt_ids"] = kwargs["txt_ids"][:4]
            found.append(model(**kwargs)[0][:, :noise])
    return found


EDIT_OF_EVEN_LENGTH = EDIT.__class__(text_tokens=4)
BUILD = {"qwen": qwen_transformer, "flux": flux_transformer, "flux2": flux2_transformer}


def awaited(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Plain tensors in place of those whose gathering may still go on."""
    return [one + 0 for one in tensors]


def cached_edits(family: str, model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"stock": awaited(edit(family, model))}
    for name, config in CONFIGS.items():
        with cached(model, config) as trace:
            found[name] = awaited(edit(family, model))
        found[f"{name} pattern"] = "".join(one.decision[0] for one in trace.steps)
    return found


def run_rank(rank: int, meeting_file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        found[f"{name}, alone"] = own_tokens(qwen_transformer(), config)
        model = qwen_transformer()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        parallel = SimpleNamespace(_flattened_mesh=mesh, ulysses_anything=False, ring_anything=False)
        model._parallel_config = SimpleNamespace(context_parallel_config=parallel)
        found[f"{name}, agreed"] = own_tokens(model, config)
    for family, build in BUILD.items():
        found[family] = cached_edits(family, split(build()))
    torch.save(found, out)
    dist.destroy_process_group()
