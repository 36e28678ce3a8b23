"""Pictures made while a LoRA is trained, by the stock pipeline's own sampling, to see how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dittocache.families.loading import component_names
from dittocache.jobs.generation import Edit, chosen_edits
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import SAMPLES_NAME
from dittocache.sampling.generate import generate


class TrainingPictures:
    """Makes the same few pictures after any step, with the same noise.

    The encoders and the decoder are loaded at the first of them and wait in the machine's memory between, so that the
    training has the device to itself.

    Args:
        transformer: the one in training, with its LoRA.
        device: where pictures are made: that of the transformer.
    """

    def __init__(self, inputs: RunInputs, transformer: Any, device: torch.device) -> None:
        self._inputs = inputs
        self._transformer = transformer
        self._device = device
        self._pipe: Any = None
        self.edits = validation_edits(inputs)

    def make(self, step: int) -> list[dict[str, Any]]:
        """Write the pictures to `RUN/samples/step-N`; return name, caption, source and path of each, for an event."""
        folder = Path(SAMPLES_NAME) / f"step-{step}"
        (self._inputs.run_dir / folder).mkdir(parents=True, exist_ok=True)
        rows = []
        with self._ready() as pipe:
            for number, edit in enumerate(self.edits):
                settings = self._inputs.config.generate
                settings = settings.model_copy(update={"seed": settings.seed + number})
                picture = generate(pipe, edit.images, edit.prompt, settings, self._inputs.sizes)
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
            components = [name for name in component_names(inputs.model) if name != "transformer"]
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
    return [
        Edit(f"prompt-{number}", samples[number % len(samples)].controls, prompt)
        for number, prompt in enumerate(prompts, start=1)
    ]
