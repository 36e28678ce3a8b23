"""What a training with the draft's settings would hold in memory, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dittocache.config import check_config
from dittocache.errors import DittocacheError
from dittocache.studio.state import Studio
from dittocache.studio.training import refuse_outside


@dataclass(frozen=True)
class MemoryWords:
    """Attributes:
    text: the plan, or why there is none.
    warning: where it is more than the device has free.
    total: bytes on the device; None where there is no plan.
    """

    text: str
    warning: str = ""
    total: int | None = None


def memory_words(studio: Studio, given: Mapping[str, Any]) -> MemoryWords:
    """The memory plan of these settings by dotted name; nothing is loaded. Needs torch: run it on the worker."""
    import torch

    from dittocache.jobs.inputs import RunInputs
    from dittocache.jobs.training_memory import forecast_memory, memory_warning

    try:
        config = check_config({}, given)
        refuse_outside(studio, config)
        inputs = RunInputs(config, config.run_dir)
        plan = forecast_memory(inputs)
        warning = memory_warning(plan, torch.device(inputs.device))
    except DittocacheError as error:
        first = (error.problems or (str(error),))[0]
        return MemoryWords(f"The memory it takes is known once data and model are: {first}")
    except (OSError, ValueError, KeyError) as error:
        return MemoryWords(f"The memory it takes could not be estimated ({error})")
    text = plan.describe()
    return MemoryWords(text[:1].upper() + text[1:], warning or "", plan.device_total)
