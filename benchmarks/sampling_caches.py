"""What a sampling cache saves of a step, beside what theory allows.

    python benchmarks/sampling_caches.py [--noise 512] [--reference 512] [--repeats 7]

Reference KV cache: a layer costs 24 d^2 q + 4 d q k for q queries and k keys. k stays L, so a cached step saves the
share L_ref / L of the blocks' time. TeaCache: a skipped step runs no block at all. Random weights: times do not depend
on them. Full and cached steps alternate, so that a busy machine slows both alike; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig

RESULTS = Path(__file__).parent / "results"
LAYERS, HEADS, HEAD_WIDTH, TEXT_WIDTH, CHANNELS = 8, 4, 64, 128, 64
TEXT_TOKENS = 32
SKIP_ALL = {"rel_l1_thresh": 1e9, "coefficients": (1.0, 0.0), "max_consecutive_skips": 10**6}


def transformer() -> Any:
    """8 layers of width 256, modulated as in Qwen-Image-Edit-2511."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS // 4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 28, 28),
        zero_cond_t=True,
    )
    return model.eval().requires_grad_(False)


def picture(tokens: int) -> tuple[int, int, int]:
    """(frames, height, width) of so many tokens, 32 a row."""
    if tokens % 32:
        raise SystemExit(f"token counts must be multiples of 32, found {tokens}")
    return 1, tokens // 32, 32


def step_seconds(model: Any, noise: int, reference: int, repeats: int, **caches: Any) -> tuple[float, float, int]:
    """Median seconds of the first step of a run and of its second, and the bytes that the caches held."""
    shapes = [[picture(noise), *([picture(reference)] if reference else [])]]
    kwargs = {
        "hidden_states": torch.randn(1, noise + reference, CHANNELS),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
        "img_shapes": shapes,
        "return_dict": False,
    }
    times: tuple[list[float], list[float]] = ([], [])
    with cached(model, **caches) as trace:
        for _ in range(repeats + 1):  # the first round warms up
            for step, t in enumerate((1.0, 0.5)):
                began = time.perf_counter()
                model(timestep=torch.tensor([t]), **kwargs)
                times[step].append(time.perf_counter() - began)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:]), trace.bytes_held


@torch.no_grad()
def measure(noise: int, reference: int, repeats: int) -> dict[str, Any]:
    """One row: seconds of a full, a cached and a skipped step, measured saving beside theory."""
    model = transformer()
    full, again, _ = step_seconds(model, noise, reference, repeats)
    first, reused, held = step_seconds(model, noise, reference, repeats, reference_kv=ReferenceKVConfig())
    skipping = TeaCacheConfig(num_inference_steps=10**6, **SKIP_ALL)
    computed, skipped, _ = step_seconds(model, noise, reference, repeats, teacache=skipping)
    return {
        "noise_tokens": noise,
        "reference_tokens": reference,
        "text_tokens": TEXT_TOKENS,
        "seconds_stock": min(full, again),
        "seconds_filling": first,
        "seconds_cached": reused,
        "saving_cached": 1 - reused / first,
        "saving_theory": reference / (TEXT_TOKENS + noise + reference),
        "bytes_held": held,
        "seconds_teacache_computed": computed,
        "seconds_teacache_skipped": skipped,
        "skipped_share": skipped / computed,
    }


def main() -> None:
    """Measure, print a table, write `results/sampling_caches.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=int, default=512, help="noise tokens (default 512)")
    parser.add_argument("--reference", type=int, default=512, help="reference tokens (default 512)")
    parser.add_argument("--repeats", type=int, default=7, help="runs that count (default 7)")
    options = parser.parse_args()
    row = measure(options.noise, options.reference, options.repeats)
    print(f"{LAYERS} layers, width {HEADS * HEAD_WIDTH}, {row['noise_tokens']} + {row['reference_tokens']} tokens")
    print(f"{'step':28}{'ms':>8}{'saved':>9}{'theory':>9}")
    for name, key in (("stock", "stock"), ("full, filling the cache", "filling")):
        print(f"{name:28}{1000 * row[f'seconds_{key}']:8.1f}")
    saved, theory = row["saving_cached"], row["saving_theory"]
    print(f"{'cached references':28}{1000 * row['seconds_cached']:8.1f}{saved:9.1%}{theory:9.1%}")
    print(f"{'TeaCache, computed':28}{1000 * row['seconds_teacache_computed']:8.1f}")
    print(f"{'TeaCache, skipped':28}{1000 * row['seconds_teacache_skipped']:8.1f}{1 - row['skipped_share']:9.1%}")
    print(f"keys and values held: {row['bytes_held'] / 1e6:.1f} MB")
    RESULTS.mkdir(exist_ok=True)
    machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.machine()}
    report = {"measured": row, "machine": {**machine, "torch": torch.__version__}}
    (RESULTS / "sampling_caches.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
