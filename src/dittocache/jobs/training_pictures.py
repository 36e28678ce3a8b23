"""Pictures made while a LoRA is trained, by the stock pipeline's own sampling, to see how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dittocache.families.loading import component_names
from dittocache.jobs.edits import Edit, make_picture
from dittocache.jobs.generation import chosen_edits
from dittocache.jobs.inputs import RunInputs, text_encoders
from dittocache.jobs.picture_prompts import PromptArguments
from dittocache.jobs.run_folder import SAMPLES_NAME


class TrainingPictures:
    """Makes the same few pictures after any step, with the same noise.

    The VAE is loaded at the first of them and waits in the machine's memory between, so that the training has the
    device to itself. No text encoder is loaded.

    Args:
        edits: what to make.
        prompts: of each edit, by its name (`picture_prompts`).
        transformer: the one in training, with its LoRA.
        device: where pictures are made: that of the transformer.
    """

    def __init__(
        self,
        inputs: RunInputs,
        edits: Sequence[Edit],
        prompts: Mapping[str, PromptArguments],
        transformer: Any,
        device: torch.device,
    ) -> None:
        self._inputs = inputs
        self._edits = edits
        self._prompts = prompts
        self._transformer = transformer
        self._device = device
        self._pipe: Any = None

    def make(self, step: int) -> list[dict[str, Any]]:
        """Write the pictures to `RUN/samples/step-N`; return name, caption, source and path of each, for an event."""
        folder = Path(SAMPLES_NAME) / f"step-{step}"
        (self._inputs.run_dir / folder).mkdir(parents=True, exist_ok=True)
        rows = []
        with self._ready() as pipe:
            for number, edit in enumerate(self._edits):
                picture = make_picture(self._inputs, pipe, edit, number, prompt_embeds=self._arguments(edit))
                file = folder / f"{edit.name.replace('/', '-')}.png"
                picture.image.save(self._inputs.run_dir / file)
                source = str(edit.images[0]) if edit.images else None
                rows.append({"name": edit.name, "caption": edit.prompt, "source": source, "picture": str(file)})
        return rows

    def _arguments(self, edit: Edit) -> PromptArguments:
        """The edit's prompts, on the device."""
        arguments = self._prompts[edit.name]
        return {name: None if one is None else one.to(self._device) for name, one in arguments.items()}

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The pipeline on the device, the transformer set to sampling; all as before at the end."""
        if self._pipe is None:
            inputs = self._inputs
            left_out = {"transformer", *text_encoders(inputs.family)}
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
