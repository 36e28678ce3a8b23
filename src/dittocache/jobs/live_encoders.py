"""The encoders that a training uses itself, where samples or prompts are not in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dittocache.jobs.inputs import RunInputs


class LiveEncoders(Mapping[str, Any]):
    """Encoder -> a pipeline with it and nothing else in memory, loaded when first asked for.

    Device management, as the embedding cache's specification has it: in cached training only the transformer is on the
    device, so an encoder that nothing asks for is never loaded. Live, each encoder runs on its device in
    `cache.devices`, the same as while caching, else beside the transformer; it stays there between steps, because the
    next step needs it again and moving it would take longer than most steps.

    Args:
        device: of the transformer.
    """

    def __init__(self, inputs: RunInputs, device: str) -> None:
        self._inputs = inputs
        self._device = device
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, encoder: str) -> Any:
        if encoder not in self._inputs.family.encoders:
            raise KeyError(encoder)
        if encoder not in self._loaded:
            inputs = self._inputs
            components = [encoder, *inputs.family.encoders[encoder]]
            device = self.device_of(encoder)
            self._loaded[encoder] = inputs.encoding_family.load_pipeline(inputs.model, components, inputs.dtype, device)
        return self._loaded[encoder]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs.family.encoders)

    def __len__(self) -> int:
        return len(self._inputs.family.encoders)

    def device_of(self, encoder: str) -> str:
        """Where the encoder runs."""
        named = {str(name) for name in self._inputs.config.cache.devices}
        return self._inputs.encoder_device(encoder) if encoder in named else self._device
