"""Embedding caches behind one face: ours, and a plain one that can be given the bad habits of public trainers.

A fault's test must pass on ours, pass on the plain cache without habits, and fail on it with the habit that the fault
is named after: so the test can fail, and for the reason that it states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tests.embeddings.toy_family import ENCODERS, Job

from dittocache.data.sample import Sample
from dittocache.embeddings.reading.reader import CachedSamples
from dittocache.families.base import Tensors
from dittocache.training.sources import CachedSource, LiveSource, MixedSource, with_empty_prompts

Habit = Literal[
    "skips what has a file",
    "names embeddings after the prompt alone",
    "trains on the folder's listing",
    "trusts every file",
    "expects every file",
    "encodes everything again",
    "writes under the final name",
    "unpickles",
    "hashes the pictures at each read",
    "casts to float16",
    "keeps the prompt's mask",
]


class CacheSystem(Protocol):
    """Caches a job's samples and trains on them."""

    def cache(self) -> None:
        """Bring the cache up to date with the job."""
        ...

    def files(self) -> list[Path]:
        """The files that hold tensors."""
        ...

    def epoch(self, dropped: Collection[str] = ()) -> dict[str, Tensors]:
        """What an epoch of training sees of each sample; the captions of `dropped` are dropped."""
        ...


class OurCache:
    """Plan, store, manifest and sources, as a training run uses them."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def cache(self) -> None:
        plan = self._job.plan()
        self._job.previous = plan.manifest
        self._job.encode(plan)

    def files(self) -> list[Path]:
        return sorted((self._job.folder / "cache/objects").rglob("*.safetensors"))

    def epoch(self, dropped: Collection[str] = ()) -> dict[str, Tensors]:
        assert self._job.previous is not None
        reader = CachedSamples(self._job.store, self._job.previous)
        source = MixedSource(CachedSource(reader), lambda: live(self._job), notice=lambda text: None)
        names = list(reader.names)
        batch = source.load(names)
        return dict(zip(names, with_empty_prompts(batch, [name in dropped for name in names]), strict=True))


class PlainCache:
    """One `.pt` file a sample and artifact; without habits it is right, and encodes everything each time."""

    def __init__(self, job: Job, *habits: Habit) -> None:
        self._job = job
        self._habits = frozenset(habits)
        self._root = job.folder / "plain"
        self._known: dict[str, Sample] = {}

    def cache(self) -> None:
        self._known |= {sample.name: sample for sample in self._job.samples}
        for encoder in ENCODERS:
            for sample in self._job.samples:
                paths = self._paths(sample, encoder)
                if "skips what has a file" in self._habits and all(path.exists() for path in paths.values()):
                    continue
                [tensors] = self._job.family.encode(self._pipe(encoder), encoder, [sample], self._job.sizes)
                for artifact, path in paths.items():
                    self._save(path, tensors[artifact])
        for sample in self._job.samples:
            self._listing.mkdir(exist_ok=True)
            (self._listing / sample.name).touch()

    def files(self) -> list[Path]:
        return sorted(self._root.rglob("*.pt"))

    def epoch(self, dropped: Collection[str] = ()) -> dict[str, Tensors]:
        samples = [self._known[path.name] for path in sorted(self._listing.iterdir())]
        if "trains on the folder's listing" not in self._habits:
            samples = self._job.samples
        return {sample.name: self._seen(sample, sample.name in dropped) for sample in samples}

    def _seen(self, sample: Sample, dropped: bool) -> Tensors:
        if "hashes the pictures at each read" in self._habits:
            hashlib.md5(sample.target.read_bytes())
        try:
            tensors = {
                name: self._load(path) for encoder in ENCODERS for name, path in self._paths(sample, encoder).items()
            }
        except FileNotFoundError:
            if "expects every file" in self._habits:
                raise
            tensors = live(self._job).load([sample.name])[0]
        except Exception:
            if "trusts every file" in self._habits:
                raise
            tensors = live(self._job).load([sample.name])[0]
        if dropped:
            tensors["prompt_embeds"] = tensors["empty_prompt_embeds"]
            if "keeps the prompt's mask" not in self._habits:
                tensors["prompt_embeds_mask"] = tensors["empty_prompt_embeds_mask"]
        return tensors

    def _pipe(self, encoder: str | None) -> Any:
        family = self._job.family
        if encoder is None:
            return None
        return family.load_pipeline(str(self._job.model), [encoder, *family.encoders[encoder]], self._job.dtype, "cpu")

    def _save(self, path: Path, tensor: torch.Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "casts to float16" in self._habits:
            tensor = tensor.to(torch.float16)
        written = path if "writes under the final name" in self._habits else path.with_suffix(".tmp")
        with written.open("wb") as stream:
            torch.save(tensor, stream)
        written.replace(path)

    def _load(self, path: Path) -> torch.Tensor:
        tensor: Any = torch.load(path, weights_only="unpickles" not in self._habits)
        return torch.as_tensor(tensor)

    def _paths(self, sample: Sample, encoder: str | None) -> dict[str, Path]:
        artifacts = self._job.family.artifacts(sample, self._job.sizes)
        names = [artifact.name for artifact in artifacts if artifact.encoder == encoder]
        return {name: self._root / name / f"{self._stem(sample, name)}.pt" for name in names}

    def _stem(self, sample: Sample, artifact: str) -> str:
        by_prompt = "names embeddings after the prompt alone" in self._habits and "prompt" in artifact
        return hashlib.md5(sample.prompt.encode()).hexdigest() if by_prompt else sample.name

    @property
    def _listing(self) -> Path:
        return self._root / "listing"


def live(job: Job) -> LiveSource:
    """The job's encoders, for what is not cached."""
    family = job.family
    components = [part for encoder, beside in family.encoders.items() for part in (encoder, *beside)]
    pipe = family.load_pipeline(str(job.model), components, job.dtype, "cpu")
    return LiveSource(pipe, family, job.samples, job.sizes)


def assert_same(found: dict[str, Tensors], expected: dict[str, Tensors]) -> None:
    """Assert that an epoch saw exactly these tensors: samples, artifacts, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        for artifact, tensor in tensors.items():
            assert found[name][artifact].dtype == tensor.dtype, (name, artifact)
            assert torch.equal(found[name][artifact], tensor), (name, artifact)
