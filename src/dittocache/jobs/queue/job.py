"""One job: what is to be run, where, and on which devices."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, check_config
from dittocache.errors import StageError


@dataclass(frozen=True)
class Job:
    """A run that waits, or waited, in a queue.

    Attributes:
        number: from 1 on, in the order of adding.
        config: the run's settings, as JSON values; `output_dir` is absolute.
        stages: to run, in order.
        devices: `cuda:0`, `cpu`, ... that it works on; no two jobs run on one at a time.
        cwd: folder that the settings' relative paths start from.
        visible: CUDA_VISIBLE_DEVICES where it was added; None where that was not set.
        typed: what the user typed to add it.
        added: seconds since the epoch.
    """

    number: int
    config: Mapping[str, Any]
    stages: Sequence[str]
    devices: Sequence[str]
    cwd: str
    visible: str | None
    typed: str
    added: float

    @property
    def key(self) -> str:
        """The job's name in the events of its run; no two jobs have the same."""
        return f"{self.number}@{self.added:.6f}"

    @property
    def run_dir(self) -> Path:
        """The run's own folder, absolute."""
        return Path(self.config["output_dir"]) / str(self.config["name"])

    def settings(self) -> RunConfig:
        """The run's settings, checked; raises ConfigError where they are of another version of dittocache."""
        return check_config(self.config, origin=f"job {self.number} of the queue")


def new_job(config: RunConfig, stages: Sequence[str], typed: str, added: float) -> Job:
    """The job that runs `stages` of this run from the working directory, without a number yet.

    Raises ConfigError for a device that is not there.
    """
    config = config.model_copy(update={"output_dir": config.output_dir.absolute()})
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = tuple(sorted({_physical(device, visible) for device in devices_of(config)}))
    settings = config.model_dump(mode="json")
    return Job(0, settings, tuple(stages), devices, str(Path.cwd()), visible, typed, added)


def devices_of(config: RunConfig) -> set[str]:
    """The devices that a run works on, as its process numbers them; raises ConfigError for one that is not there."""
    from dittocache.jobs.inputs import RunInputs

    inputs = RunInputs(config, config.run_dir)
    named = {inputs.device, *(inputs.encoder_device(encoder) for encoder in config.cache.devices)}
    devices = {"cuda:0" if device == "cuda" else device for device in named}
    if inputs.device.startswith("cuda"):
        devices |= {f"cuda:{rank}" for rank in range(config.train.processes) if config.train.processes > 1}
        devices |= _of_workers(inputs.device, config.cache.workers)
    return devices


def job_text(job: Job, **more: Any) -> str:
    """The job as JSON, with whatever is to be kept beside it."""
    return json.dumps({**asdict(job), **more}, indent=1, ensure_ascii=False)


def read_job(path: Path) -> tuple[Job, dict[str, Any]]:
    """The job of a file, and what is kept beside it; raises StageError where the file is no job."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: content.pop(name) for name in Job.__dataclass_fields__}
        job = Job(**fields)
        if not (
            isinstance(job.number, int) and isinstance(job.config, dict) and {"output_dir", "name"} <= set(job.config)
        ):
            raise ValueError("its fields hold something else")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path} is no job of a queue ({type(error).__name__}: {error}); remove the file") from error
    return job, content


def _of_workers(device: str, workers: int) -> set[str]:
    """The GPUs that the workers of a caching stage are dealt out to."""
    import torch

    from dittocache.jobs.ranks import device_of_worker

    count = torch.cuda.device_count()
    return {device_of_worker(device, position, count) for position in range(1, workers)}


def _physical(device: str, visible: str | None) -> str:
    """The same device as a process without CUDA_VISIBLE_DEVICES would number it."""
    kind, _, index = device.partition(":")
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    if kind != "cuda" or not index.isdecimal() or int(index) >= len(names):
        return device
    return f"cuda:{names[int(index)]}"
