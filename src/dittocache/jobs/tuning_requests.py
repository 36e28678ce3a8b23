"""What calibrating and tuning make pictures of: the run's own prompts, pictures, LoRA, sampler and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import cycle, islice
from typing import Any

from blake3 import blake3

from dittocache.data.sample import Sample
from dittocache.errors import ConfigError
from dittocache.families.denoiser import find_denoiser
from dittocache.families.loading import component_names
from dittocache.jobs.edits import PLAIN, Edit, Way, make_picture
from dittocache.jobs.generation import chosen_edits
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import LORA_NAME, PROFILE_NAME
from dittocache.quality.calibration.recording import Recording
from dittocache.quality.tuning.settings import Setting
from dittocache.sampling.generate import Picture, steps_of
from dittocache.teacache.fingerprint import fingerprint, json_digest
from dittocache.teacache.profile import Calibration, Profile, RunPrint, profiles_folder


@dataclass(frozen=True)
class Request:
    """A picture of the run; its noise depends on its number."""

    inputs: RunInputs
    pipe: Any
    edit: Edit
    number: int

    @cached_property
    def key(self) -> str:
        """Of words, pictures, noise and everything in the `generate` section."""
        references = [blake3(path.read_bytes()).hexdigest() for path in self.edit.images]
        settings = self.inputs.config.generate.model_dump(mode="json", exclude={"prompt", "image"})
        sizes = [self.edit.size, str(self.edit.control_resolution), str(self.inputs.sizes)]
        return json_digest([self.edit.prompt, references, self.number, settings, sizes])

    def make(self, setting: Setting) -> Picture:
        """The picture, plain or with the setting's caches."""
        way = Way(setting.method, "cached", "", setting.steps, setting.teacache, setting.reference_kv)
        return make_picture(self.inputs, self.pipe, self.edit, self.number, way)


def load_pipeline(inputs: RunInputs) -> Any:
    """The run's pipeline, with its LoRA where one was trained, after a first call that would be timed with another."""
    pipe = inputs.family.load_pipeline(inputs.model, component_names(inputs.model), inputs.dtype, inputs.device)
    if (inputs.run_dir / LORA_NAME).is_dir():
        pipe.load_lora_weights(str(inputs.run_dir / LORA_NAME))
    warm_up = Way("warm-up", "uncached", steps=2)
    make_picture(inputs, pipe, edits_of(inputs)[0][0], 0, warm_up)
    return pipe


def edits_of(inputs: RunInputs) -> tuple[list[Edit], list[Edit]]:
    """(to search on, to verify on), of different samples; raises ConfigError where there is nothing to make.

    With `generate.prompt` or `generate.image` that one edit serves as both, with other noise. Else the training set,
    and the held-out set where there is one, else every second sample of the training set.
    """
    generate = inputs.config.generate
    if generate.prompt is not None or generate.image:
        one = chosen_edits(inputs)
        return one, one
    samples, held_out = list(inputs.samples), list(inputs.held_out)
    if not samples:
        raise ConfigError(
            "data.path holds no samples, and generate.prompt is not given; there is nothing to measure on"
        )
    if not held_out:
        samples, held_out = samples[::2], samples[1::2] or samples
    return [_edit(sample) for sample in samples], [_edit(sample) for sample in held_out]


def requests_of(inputs: RunInputs, pipe: Any, count: int, held_out: int) -> tuple[list[Request], list[Request]]:
    """`count` requests to search on and `held_out` to verify on, each with noise of its own.

    Spread over the samples; where there are fewer, they come again with other noise.
    """
    searched, verified = edits_of(inputs)
    chosen = [*_spread(searched, count), *_spread(verified, held_out)]
    requests = [Request(inputs, pipe, edit, number) for number, edit in enumerate(chosen)]
    return requests[:count], requests[count:]


def run_print(inputs: RunInputs, pipe: Any, recording: Recording, size: tuple[int, int]) -> RunPrint:
    """What kind of runs these are."""
    generate = inputs.config.generate
    guidance = {"true_cfg_scale": generate.true_cfg_scale}
    if generate.guidance_scale is not None:
        guidance["guidance_scale"] = generate.guidance_scale
    return RunPrint(
        steps=steps_of(pipe, generate),
        tokens=recording.tokens,
        branches=max(1, len(recording.branches)),
        size=size,
        guidance=guidance,
    )


def save_profile(
    inputs: RunInputs,
    pipe: Any,
    run: RunPrint,
    calibration: dict[Any, Calibration],
    settings: dict[str, Any] | None,
    remark: str = "",
) -> Profile:
    """Write the profile to the run folder, and to the folder where `auto` finds it."""
    profile = Profile(
        made=datetime.now().astimezone(),
        model=fingerprint(find_denoiser(pipe)),
        run=run,
        calibration=calibration,
        settings=settings,
        remark=remark,
    )
    profile.save(inputs.run_dir / PROFILE_NAME)
    profile.save(profiles_folder() / profile.file_name)
    return profile


def plain_picture(request: Request) -> Picture:
    """The picture without a cache."""
    return make_picture(request.inputs, request.pipe, request.edit, request.number, PLAIN)


def _spread(edits: Sequence[Edit], count: int) -> list[Edit]:
    if len(edits) >= count:
        return [edits[number * len(edits) // count] for number in range(count)]
    return list(islice(cycle(edits), count))


def _edit(sample: Sample) -> Edit:
    size = None if sample.controls else sample.size
    return Edit(sample.name, sample.controls, sample.prompt, sample.target, size, sample.control_resolution)
