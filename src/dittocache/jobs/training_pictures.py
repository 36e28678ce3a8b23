"""Pictures made while a LoRA is trained, by the stock pipeline's own sampling, to see how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.errors import RecordCorruptError, RecordMissingError
from dittocache.families.loading import component_names
from dittocache.jobs.edits import Edit, make_picture
from dittocache.jobs.generation import chosen_edits
from dittocache.jobs.inputs import RunInputs, load_manifest, text_encoders
from dittocache.jobs.run_folder import SAMPLES_NAME

PROMPT_ARTIFACTS = ("prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds")  # named as the pipelines' arguments


class TrainingPictures:
    """Makes the same few pictures after any step, with the same noise.

    What else the pipeline needs is loaded at the first of them and waits in the machine's memory between, so that the
    training has the device to itself. Pictures of cached training samples take their prompts from the cache: without
    guidance no text encoder is loaded.

    Args:
        transformer: the one in training, with its LoRA.
        device: where pictures are made: that of the transformer.
    """

    def __init__(self, inputs: RunInputs, transformer: Any, device: torch.device) -> None:
        self._inputs = inputs
        self._transformer = transformer
        self._device = device
        self._pipe: Any = None
        self._prompts: Mapping[str, Mapping[str, torch.Tensor]] = {}
        self.edits = validation_edits(inputs)

    def make(self, step: int) -> list[dict[str, Any]]:
        """Write the pictures to `RUN/samples/step-N`; return name, caption, source and path of each, for an event."""
        folder = Path(SAMPLES_NAME) / f"step-{step}"
        (self._inputs.run_dir / folder).mkdir(parents=True, exist_ok=True)
        rows = []
        with self._ready() as pipe:
            for number, edit in enumerate(self.edits):
                picture = make_picture(self._inputs, pipe, edit, number, prompt_embeds=self._prompts.get(edit.name))
                file = folder / f"{edit.name.replace('/', '-')}.png"
                picture.image.save(self._inputs.run_dir / file)
                source = str(edit.images[0]) if edit.images else None
                rows.append({"name": edit.name, "caption": edit.prompt, "source": source, "picture": str(file)})
        return rows

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The pipeline on the device, the transformer set to sampling; all as before at the end."""
        if self._pipe is None:
            inputs = self._inputs
            self._prompts = cached_prompts(inputs, self.edits, self._device)
            left_out = {"transformer", *(text_encoders(inputs.family) if self._prompts else ())}
            components = [name for name in component_names(inputs.model) if name not in left_out]
            self._pipe = inputs.family.load_pipeline(inputs.model, components, inputs.dtype, "cpu")
        parts = [part for part in self._pipe.components.values() if isinstance(part, torch.nn.Module)]
        training = self._transformer.training
        try:
            for part in parts:
                part.to(self._device)
            self._pipe.transformer = self._transformer.eval()
            yield self._pipe
        finally:
            self._pipe.transformer = None
            self._transformer.train(training)
            for part in parts:
                part.to("cpu")


def validation_edits(inputs: RunInputs) -> Sequence[Edit]:
    """What to make: `train.validation_prompts` on the first samples' references, else what is generated in the end."""
    settings = inputs.config.train
    if not settings.validation_prompts:
        return chosen_edits(inputs)[: settings.validation_pictures]
    samples = inputs.held_out or inputs.samples
    prompts = settings.validation_prompts[: settings.validation_pictures]
    edits = []
    for number, prompt in enumerate(prompts, start=1):
        sample = samples[number % len(samples)]
        name = f"prompt-{number}"
        edits.append(Edit(name, sample.controls, prompt, control_resolution=sample.control_resolution))
    return edits


def cached_prompts(
    inputs: RunInputs, edits: Sequence[Edit], device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    """By edit, the pipeline's arguments that stand for its prompt; empty where the prompt of any is not in the cache.

    Held-out pictures and prompts of one's own never are; nor, with guidance on, is the negative prompt.
    """
    if not inputs.config.cache.use_cache or inputs.config.generate.true_cfg_scale > 1:
        return {}
    samples = {(sample.name, sample.controls, sample.prompt) for sample in inputs.samples}
    if not all((edit.name, edit.images, edit.prompt) in samples for edit in edits):
        return {}
    reader = CachedSamples(inputs.store, load_manifest(inputs))
    try:
        tensors = {edit.name: reader.load(edit.name) for edit in edits}
    except (RecordMissingError, RecordCorruptError):
        return {}
    return {
        name: {key: one.unsqueeze(0).to(device) for key, one in artifacts.items() if key in PROMPT_ARTIFACTS}
        for name, artifacts in tensors.items()
    }
