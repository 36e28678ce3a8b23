"""Where a pipeline's components lie while it makes pictures: all on the device, or brought there in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

Offload = Literal["none", "components", "layers"]

WORKING_BYTES = 8_000_000_000
"""Left free for activations: a 1024 x 1024 edit with two references, and decoding it."""


def choose_offload(component_bytes: Mapping[str, int], free_bytes: int) -> Offload:
    """The fastest placement that fits: `component_bytes` are the weights of each component, `free_bytes` the device's.

    Everything on the device; else one component at a time; else one layer at a time.
    """
    if sum(component_bytes.values()) + WORKING_BYTES <= free_bytes:
        return "none"
    if max(component_bytes.values(), default=0) + WORKING_BYTES <= free_bytes:
        return "components"
    return "layers"


def place(pipe: Any, device: str, offload: Offload) -> None:
    """Put a pipeline that lies in the machine's memory on `device`, as a whole or in parts, by diffusers' own means.

    On a CPU there is nowhere to bring parts from: the pipeline stays.
    """
    target = torch.device(device)
    if offload == "none" or target.type == "cpu":
        pipe.to(target)
    elif offload == "components":
        pipe.enable_model_cpu_offload(device=target)
    else:
        streamed = target.type == "cuda"
        pipe.enable_group_offload(
            onload_device=target, offload_type="leaf_level", use_stream=streamed, non_blocking=streamed
        )
