"""Step caches of other projects behind one interface: each on a pipeline for the length of a `with`.

diffusers: FirstBlockCache, MagCache (ratios measured on a run of the same model), TaylorSeer in lite mode, SeaCache
(its step, sigma and latents passed by hand: on Qwen-Image it does nothing by itself). cache-dit, where it is installed:
DBCache with one block computed, with and without TaylorSeer.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

Peer = Callable[[Any, float, int], AbstractContextManager[None]]
"""Takes the pipeline, the method's main knob and the number of steps."""

CHOSEN_AT = 28
"""Steps at which the values of the knobs were chosen."""


@contextmanager
def first_block_cache(pipe: Any, threshold: float, steps: int) -> Iterator[None]:
    """diffusers FirstBlockCache; the knob is its threshold."""
    from diffusers import FirstBlockCacheConfig

    with _enabled(pipe, FirstBlockCacheConfig(threshold=threshold)):
        yield


@contextmanager
def taylorseer(pipe: Any, interval: float, steps: int) -> Iterator[None]:
    """diffusers TaylorSeer in lite mode; the knob is the interval between computed steps."""
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=int(interval),
        disable_cache_before_step=2,
        disable_cache_after_step=steps - 1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    with _enabled(pipe, config):
        yield


@contextmanager
def mag_cache(pipe: Any, threshold: float, steps: int) -> Iterator[None]:
    """diffusers MagCache; the knob is its threshold, the ratios are those of the model (`pipe.mag_ratios()`)."""
    from diffusers import MagCacheConfig

    ratios = pipe.mag_ratios()
    config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios, retention_ratio=0.1)
    with _enabled(pipe, config):
        yield


def mag_ratios(pipe: Any, steps: int, run: Callable[[], object]) -> list[float]:
    """MagCache's ratios for this model and number of steps, as its calibration prints them."""
    from diffusers import MagCacheConfig

    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with _enabled(pipe, config), contextlib.redirect_stdout(printed):
        run()
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    found: list[float] = ast.literal_eval(lists[0])
    return found


@contextmanager
def sea_cache(pipe: Any, threshold: float, steps: int) -> Iterator[None]:
    """diffusers SeaCache of order 1, told by hand where the loop stands; the knob is its threshold."""
    from diffusers import SeaCacheConfig

    transformer, scheduler = pipe.transformer, pipe.scheduler

    def latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        _, height, width = kwargs["img_shapes"][0][0]
        noise = kwargs["hidden_states"][:, : height * width]
        return [one.T.reshape(-1, 1, height, width) for one in noise]  # (C, frames, height, width)

    stock = transformer.cache_context

    def told(name: str, **known: Any) -> Any:
        index = scheduler.step_index or 0
        place = {"step_index": index, "sigma": float(scheduler.sigmas[index]), "num_inference_steps": steps}
        return stock(name, **{**place, **known})

    with _enabled(pipe, SeaCacheConfig(threshold=threshold, raw_vision_callback=latents)):
        transformer.cache_context = told
        try:
            yield
        finally:
            del transformer.cache_context


def cache_dit(taylor: bool, guided: bool) -> Peer:
    """cache-dit's DBCache with one block computed (F1B0), with or without TaylorSeer; the knob is its threshold.

    It tells CFG branches apart by counting calls, so it must be told whether there is guidance.
    """

    @contextmanager
    def cached(pipe: Any, threshold: float, steps: int) -> Iterator[None]:
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=2,
            num_inference_steps=steps,
            enable_separate_cfg=guided,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return cached


@contextmanager
def _enabled(pipe: Any, config: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def peers(steps: int, guided: bool) -> Mapping[str, tuple[Peer, tuple[float, ...]]]:
    """Name -> (method, the values of its knob to sweep), for runs of so many steps, with or without guidance."""
    finer = CHOSEN_AT / steps

    def thresholds(*values: float) -> tuple[float, ...]:
        return tuple(float(f"{value * finer:.2g}") for value in values)

    found: dict[str, tuple[Peer, tuple[float, ...]]] = {
        "diffusers FirstBlockCache": (first_block_cache, thresholds(0.04, 0.06, 0.1)),
        "diffusers MagCache": (mag_cache, thresholds(0.02, 0.06, 0.12)),
        "diffusers TaylorSeer lite": (taylorseer, (2, 3, 4)),
        "diffusers SeaCache": (sea_cache, thresholds(0.1, 0.2, 0.4)),
    }
    if importlib.util.find_spec("cache_dit") is not None:
        found["cache-dit F1B0"] = (cache_dit(False, guided), thresholds(0.05, 0.08, 0.12, 0.2))
        found["cache-dit F1B0 + TaylorSeer"] = (cache_dit(True, guided), thresholds(0.05, 0.08, 0.12, 0.2))
    return found
