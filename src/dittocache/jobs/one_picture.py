"""The stage behind the Studio's page *Generate*: one picture, without and with the caches that are set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dittocache.errors import ConfigError, DataError
from dittocache.events import EventLog, Progress
from dittocache.families.stock_calls import ControlResolution
from dittocache.jobs.edits import PLAIN, Edit, Way, make_picture
from dittocache.jobs.generation import cached_ways, checked_lora, described, described_picture, use_lora
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.placed_pipeline import load_placed
from dittocache.jobs.run_folder import SAMPLES_NAME
from dittocache.quality.metrics import SSIM_WINDOW, capped, psnr, ssim
from dittocache.sampling.generate import Picture, steps_of

WARM_UP_STEPS = 2


def make_one(inputs: RunInputs, log: EventLog) -> None:
    """Make the picture of `generate.prompt` in `RUN/samples`: with all caches that are set, and without them beside it.

    With a LoRA where there is one. Emits a `result` after each picture, in which `compared` holds one row like those
    of the generate stage; a cached variant also says its `psnr` (dB, at most 100) and `ssim` to the uncached one.
    Raises ConfigError without a prompt, ModelError for a LoRA that cannot be used.
    """
    edit = _edit(inputs, log)
    lora = checked_lora(inputs)
    pipe = load_placed(inputs, log)
    if lora is not None:
        use_lora(pipe, lora)
    ways = ways_of(inputs)
    if len(ways) > 1:  # the first call allocates: its time would be laid on the side that is made first
        make_picture(inputs, pipe, edit, 0, Way("warm-up", "uncached", steps=WARM_UP_STEPS))
    progress = Progress(log, len(ways) * steps_of(pipe, inputs.config.generate))
    variants: list[dict[str, Any]] = []
    uncached: Image.Image | None = None
    for way in ways:
        picture = make_picture(inputs, pipe, edit, 0, way, on_step=progress.advance)
        variants.append(_variant(inputs, way, picture, uncached))
        log.emit("result", compared=[{**described(edit), "variants": [*variants]}], words=_words(variants))
        uncached = picture.image if way.role == "uncached" else uncached


def ways_of(inputs: RunInputs) -> Sequence[Way]:
    """How the picture is made: plainly, with all caches that are set, or both."""
    cached = cached_ways(inputs)[-1:]
    plain = [Way("Uncached", PLAIN.role)]
    return [*(plain if inputs.config.generate.side_by_side or not cached else []), *cached]


def _edit(inputs: RunInputs, log: EventLog) -> Edit:
    settings = inputs.config.generate
    if not (settings.prompt or "").strip():
        raise ConfigError("generate.prompt is missing: say what to make, or what to do with the picture")
    return Edit("picture", tuple(settings.image), settings.prompt or "", control_resolution=_as_trained(inputs, log))


def _as_trained(inputs: RunInputs, log: EventLog) -> ControlResolution:
    """To what size training brought references; the usual one where its data set is no longer there."""
    try:
        return inputs.samples[0].control_resolution if inputs.samples else None
    except DataError as error:
        log.message(
            f"references are brought to the model's usual size: the data set cannot be read ({error})", "warning"
        )
        return None


def _variant(inputs: RunInputs, way: Way, picture: Picture, uncached: Image.Image | None) -> dict[str, Any]:
    file = Path(SAMPLES_NAME) / f"{way.role}.png"
    (inputs.run_dir / file).parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(inputs.run_dir / file)
    return described_picture(picture, way, str(file)) | ({} if uncached is None else _distance(uncached, picture.image))


def _distance(uncached: Image.Image, cached: Image.Image) -> dict[str, float]:
    distance = {"psnr": capped(psnr(uncached, cached))}
    if min(cached.size) >= SSIM_WINDOW:
        distance["ssim"] = ssim(uncached, cached)
    return distance


def _words(variants: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{variant['label']} {variant['seconds']:.2f} s" for variant in variants)
