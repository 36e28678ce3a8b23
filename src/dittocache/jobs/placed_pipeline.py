"""The whole pipeline for making pictures, on the device as far as it fits there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dittocache.embeddings.planning.identity import model_folder
from dittocache.events import EventLog
from dittocache.families.loading import component_names
from dittocache.jobs.inputs import RunInputs
from dittocache.sampling.placement import choose_offload, place
from dittocache.training.transformer_facts import safetensors_sizes


def load_placed(inputs: RunInputs, log: EventLog) -> Any:
    """The whole pipeline, on the device as far as it fits there."""
    device, names = inputs.device, component_names(inputs.model)
    offload = inputs.config.generate.offload
    on_cuda = torch.device(device).type == "cuda"
    if offload == "auto":
        free = torch.cuda.mem_get_info(torch.device(device))[0] if on_cuda else None
        offload = "none" if free is None else choose_offload(weights_bytes(inputs, names), free)
        if offload != "none":
            log.message(f"the model is larger than the free memory of {device}: generate.offload {offload}")
    elif offload != "none" and not on_cuda:
        log.message(f"generate.offload {offload} does nothing on {device}", level="warning")
        offload = "none"
    pipe = inputs.family.load_pipeline(inputs.model, names, inputs.dtype, device if offload == "none" else "cpu")
    if offload != "none":
        place(pipe, device, offload)
    return pipe


def weights_bytes(inputs: RunInputs, names: Sequence[str]) -> dict[str, int]:
    """Bytes of each component's weights in the run's number format, by the headers of its files."""
    folder = model_folder(inputs.model)
    return {name: sum(safetensors_sizes(folder / name).values()) * inputs.dtype.itemsize for name in names}
