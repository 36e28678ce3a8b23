"""What a step cache saves at the real size: seconds of computed and skipped steps, and of whole pictures.

    python -m benchmarks.gpu.step_cache [--steps 28] [--guidance 1 4] [--family qwen-image] [--repeats 3]
    python -m benchmarks.gpu.step_cache --tiny

Weights are random, so schedules are fixed beforehand: so many of the steps are computed, spread evenly, and the output
is predicted in the others. The pipeline runs from a prompt's embeddings to the picture; just before every cached run
stands one without a cache. `ideal` is the number of steps over the number of computed ones: the speed if skipped steps,
the decoder and all else took no time. The rows of the two gates compute every step; what they measure, decide and keep
is all that they add. Results are saved after every row; started again, the program goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.random_models import random_numbers
from benchmarks.gpu.workplace import (
    Results,
    Workplace,
    columns,
    common_arguments,
    device_of,
    edits_pictures,
    make_workplace,
    ran_out_of_memory,
    results_path,
    synchronize,
)

from dittocache.embeddings.encoding.memory import free_memory
from dittocache.families.stock_calls import usual_steps
from dittocache.quality.tuning.settings import spread
from dittocache.sampling.config import GenerateConfig
from dittocache.sampling.generate import Picture, generate
from dittocache.sampling.session import without_remarks
from dittocache.teacache.config import TeaCacheConfig

COMPONENTS = ("transformer", "scheduler", "vae")
SHARES = (1, 2, 3, 4)
"""One step of so many is computed."""


@without_remarks()  # that a mild setting skips nothing is no news here
def main(words: Sequence[str]) -> Results:
    """Measure what the results lack, print the table."""
    wanted = parser().parse_args(words)
    device = device_of(wanted)
    ends = time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory(prefix="dittocache-gpu-", dir=wanted.folder) as folder:
        place = make_workplace(Path(folder), wanted.family, wanted.tiny, wanted.resolution, samples=1)
        settings = {
            "family": place.family_name,
            "tiny": place.tiny,
            "resolution": place.resolution,
            "prompt_tokens": wanted.prompt_tokens,
            "repeats": wanted.repeats,
            "dtype": str(place.dtype),
        }
        results = Results(results_path(wanted.results, "step-cache", place, device), settings, wanted.fresh)
        pipe = place.family.load_pipeline(str(place.model), COMPONENTS, place.dtype, device)
        steps = wanted.steps or usual_steps(pipe)
        missing = [row for row in rows(steps, wanted.guidance) if results.find(row) is None]
        warmed = False
        for row in missing:
            if time.monotonic() > ends:
                print(f"no time left for: {row}; start again to go on", file=sys.stderr, flush=True)
                break
            if not warmed:  # the first call allocates and chooses kernels
                picture(place, pipe, {**row, "steps": min(steps, 4)}, None, wanted.prompt_tokens, device)
                warmed = True
            results.add(row, measured(place, pipe, row, wanted.prompt_tokens, wanted.repeats, device))
            print("  ".join(_cells(results.rows[-1])), file=sys.stderr, flush=True)
    print(table(results))
    return results


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    options = common_arguments(__doc__)
    options.set_defaults(family="qwen-image")
    options.add_argument("--steps", type=int, help="denoising steps; by default what is usual for the model")
    options.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0], help="true_cfg_scale; 1 is off")
    options.add_argument("--prompt-tokens", type=int, default=128, help="length of the prompt's embeddings")
    options.add_argument("--repeats", type=int, default=3, help="pairs of runs a row; medians are told")
    return options


def rows(steps: int, guidances: Sequence[float]) -> list[dict[str, Any]]:
    """What is measured: the gates where they skip nothing, then schedules from mild to harsh."""
    gates = [{"gate": gate, "computed": steps} for gate in ("distance", "error")]
    counts = dict.fromkeys(max(3, round(steps / share)) for share in SHARES)
    schedules = [{"gate": "schedule", "computed": count} for count in counts]
    return [{"steps": steps, "guidance": guidance, **one} for guidance in guidances for one in gates + schedules]


def config_of(row: dict[str, Any]) -> TeaCacheConfig:
    """The cache of a row; a gate that is asked at every step and skips none."""
    if row["gate"] == "schedule":
        return TeaCacheConfig(gate="schedule", schedule=spread(row["steps"], row["computed"], 1.0))
    if row["gate"] == "distance":
        return TeaCacheConfig(rel_l1_thresh=1e-12, coefficients=(1.0, 0.0))
    return TeaCacheConfig(gate="error", error_tolerance=1e-30)


def measured(
    place: Workplace, pipe: Any, row: dict[str, Any], tokens: int, repeats: int, device: str
) -> dict[str, Any]:
    """Medians over the pairs, bytes that the cache held and the most that was allocated; or where memory ran out."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    pairs = []
    try:
        for _ in range(repeats):
            plain = picture(place, pipe, row, None, tokens, device)
            pairs.append((plain, picture(place, pipe, row, config_of(row), tokens, device)))
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        free_memory()
        return {"out_of_memory": str(error).splitlines()[0]}
    found = {
        "speed": statistics.median(plain.seconds / cached.seconds for plain, cached in pairs),
        "ideal": row["steps"] * len(pairs) / sum(_computed_steps(cached) for _, cached in pairs),
        "seconds": statistics.median(cached.seconds for _, cached in pairs),
        "plain_seconds": statistics.median(plain.seconds for plain, _ in pairs),
        "plain_step": _median_step([plain for plain, _ in pairs], "computed"),
        "computed_step": _median_step([cached for _, cached in pairs], "computed"),
        "skipped_step": _median_step([cached for _, cached in pairs], "skipped"),
        "bytes_held": max(cached.trace.bytes_held for _, cached in pairs),
    }
    if device.startswith("cuda"):
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def picture(
    place: Workplace, pipe: Any, row: dict[str, Any], config: TeaCacheConfig | None, tokens: int, device: str
) -> Picture:
    """One picture, from embeddings on; its seconds end when the device has done all."""
    [sample] = place.samples
    settings = GenerateConfig(
        num_inference_steps=row["steps"],
        true_cfg_scale=row["guidance"],
        width=place.resolution,
        height=place.resolution,
    )
    controls = sample.controls if edits_pictures(place.family_name) else ()
    synchronize(device)
    made = generate(pipe, controls, "", settings, place.sizes, config, prompt_embeds=embeddings(pipe, row, tokens))
    synchronize(device)
    return made


def embeddings(pipe: Any, row: dict[str, Any], tokens: int) -> dict[str, torch.Tensor | None]:
    """Random embeddings of a prompt of so many tokens, and of a negative one where guidance is on."""
    config = pipe.transformer.config
    like = {"device": pipe.transformer.device, "dtype": pipe.transformer.dtype}
    width = config.joint_attention_dim

    def made(start: int) -> torch.Tensor:
        numbers = random_numbers()[start : start + tokens * width]
        return numbers.view(1, tokens, width).to(**like)

    if "pooled_projection_dim" in config:  # FLUX
        pooled = random_numbers()[: config.pooled_projection_dim].view(1, -1).to(**like)
        found: dict[str, torch.Tensor | None] = {"prompt_embeds": made(0), "pooled_prompt_embeds": pooled}
        others = {"negative_prompt_embeds": made(1), "negative_pooled_prompt_embeds": pooled.flip(1)}
    else:
        mask = torch.ones(1, tokens, dtype=torch.long, device=pipe.transformer.device)
        found = {"prompt_embeds": made(0), "prompt_embeds_mask": mask}
        others = {"negative_prompt_embeds": made(1), "negative_prompt_embeds_mask": mask}
    return found if row["guidance"] <= 1 else {**found, "negative_prompt": None, **others}


def table(results: Results) -> str:
    """The rows for a terminal."""
    heads = ("", "speed", "ideal", "plain step ms", "computed step ms", "skipped step ms", "cache MB", "peak GB")
    return "\n".join([columns(heads, [_cells(one) for one in results.rows]), f"results: {results.path}"])


def _computed_steps(made: Picture) -> int:
    return len({one.step for one in made.trace.steps if one.decision == "computed"})


def _median_step(pictures: Sequence[Picture], decision: str) -> float | None:
    """Seconds of a call of the transformer; None where there was none such."""
    found = [one.seconds for made in pictures for one in made.trace.steps if one.decision == decision]
    return statistics.median(found) if found else None


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    row = one["row"]
    name = f"{row['gate']}, {row['computed']} of {row['steps']} steps computed, guidance {row['guidance']:g}"
    if "out_of_memory" in one:
        return (name, f"out of memory: {one['out_of_memory']}", *[""] * 6)
    steps = [one[key] for key in ("plain_step", "computed_step", "skipped_step")]
    return (
        name,
        f"{one['speed']:.3f}x",
        f"{one['ideal']:.2f}x",
        *("-" if value is None else f"{1000 * value:.2f}" for value in steps),
        f"{one['bytes_held'] / 1e6:.1f}",
        f"{one['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in one else "-",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
