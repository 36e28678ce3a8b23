"""Where a training step gets its tensors from: the embedding cache, live encoders, or both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from dittocache.data.sample import Sample
from dittocache.errors import DataError, RecordCorruptError, RecordMissingError
from dittocache.families.base import Family, Sizes, Tensors

Bucket = tuple[tuple[int, ...], ...]


class Source(Protocol):
    """Gives the artifacts of samples, by name."""

    def load(self, names: Sequence[str]) -> list[Tensors]:
        """The artifacts of each sample, without a batch axis."""
        ...

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[list[Tensors]]:
        """`load` for one batch after another; may read ahead."""
        ...

    def bucket(self, name: str) -> Bucket:
        """What samples of one batch must have in common: their `img_shapes`, rows of (frames, height, width)."""
        ...


class Reader(Protocol):
    """What a source needs of the embedding cache: `embeddings.reading.reader.CachedSamples`."""

    @property
    def names(self) -> Sequence[str]:
        """The samples that the cache knows."""
        ...

    def load(self, name: str) -> Tensors:
        """All artifacts of a sample; raises RecordMissingError or RecordCorruptError."""
        ...

    def artifact(self, name: str, artifact: str) -> torch.Tensor:
        """One artifact of a sample; raises as `load` does."""
        ...

    def prefetch(self, batches: Iterable[Sequence[str]], threads: int = 2) -> Iterator[list[Tensors]]:
        """`load` for batches of samples, read ahead in threads."""
        ...


class CachedSource:
    """Reads every sample from the embedding cache: neither VAE nor text encoder is in memory.

    Raises RecordMissingError for a sample that is not cached, RecordCorruptError for a damaged record.
    """

    def __init__(self, reader: Reader, threads: int = 2) -> None:
        self._reader = reader
        self._threads = threads
        self._known = frozenset(reader.names)

    def load(self, names: Sequence[str]) -> list[Tensors]:
        """Read each sample."""
        return [self._reader.load(name) for name in self._checked(names)]

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[list[Tensors]]:
        """Read batches ahead in threads."""
        yield from self._reader.prefetch((self._checked(names) for names in batches), threads=self._threads)

    def bucket(self, name: str) -> Bucket:
        """`img_shapes` as stored."""
        self._checked([name])
        return _rows(self._reader.artifact(name, "img_shapes"))

    def _checked(self, names: Sequence[str]) -> Sequence[str]:
        for name in names:
            if name not in self._known:
                raise RecordMissingError(f"the manifest has no sample {name!r}; cache the data set again")
        return names


class LiveSource:
    """Encodes each sample whenever it is asked for, with the encoders of `pipe`: no cache, more memory and time.

    Args:
        pipe: a pipeline with all encoders, or by encoder a pipeline with that one, which may have its own device and
            may be loaded when first asked for.
        empty_prompts: False where captions are never dropped: the empty prompts are then not encoded, as a trainer
            without a cache would not, which matters when cached and live steps are timed against each other.
    """

    def __init__(
        self, pipe: Any, family: Family, samples: Iterable[Sample], sizes: Sizes, *, empty_prompts: bool = True
    ) -> None:
        self._pipe = pipe
        self._family = family
        self._samples = {sample.name: sample for sample in samples}
        self._sizes = sizes
        self._empty_prompts = empty_prompts

    def load(self, names: Sequence[str]) -> list[Tensors]:
        """Encode each sample; raises DataError for an unknown name or a picture that cannot be read."""
        samples = [self._sample(name) for name in names]
        tensors: list[Tensors] = [{} for _ in samples]
        wanted = None if self._empty_prompts else [self._without_empty_prompts(sample) for sample in samples]
        for encoder in (*self._family.encoders, None):
            parts = self._family.encode(self._pipe_of(encoder), encoder, samples, self._sizes, wanted=wanted)
            for merged, part in zip(tensors, parts, strict=True):
                merged |= part
        return tensors

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[list[Tensors]]:
        """Encode batch after batch; nothing is encoded ahead."""
        for names in batches:
            yield self.load(names)

    def bucket(self, name: str) -> Bucket:
        """`img_shapes`, from the pictures' headers."""
        sample, wanted = self._sample(name), [{"img_shapes"}]  # no more: a loss mask would be decoded too
        [tensors] = self._family.encode(self._pipe_of(None), None, [sample], self._sizes, wanted=wanted)
        return _rows(tensors["img_shapes"])

    def _pipe_of(self, encoder: str | None) -> Any:
        if not isinstance(self._pipe, Mapping):
            return self._pipe
        return None if encoder is None else self._pipe[encoder]

    def _without_empty_prompts(self, sample: Sample) -> set[str]:
        names = {artifact.name for artifact in self._family.artifacts(sample, self._sizes)}
        return {name for name in names if not name.startswith("empty_")}

    def _sample(self, name: str) -> Sample:
        if name not in self._samples:
            raise DataError(f"no sample named {name!r} in the data set of {len(self._samples)} samples")
        return self._samples[name]


class MixedSource:
    """Reads what is cached and encodes the rest live, so that a partial or damaged cache never stops a run.

    Args:
        cached: the cache; it raises RecordMissingError or RecordCorruptError for what it cannot give.
        open_live: loads the encoders; called at the first sample that is not cached, never before.
        notice: called once, with a sentence for the user, when the first sample is encoded live.
    """

    def __init__(self, cached: Source, open_live: Callable[[], Source], notice: Callable[[str], None]) -> None:
        self._cached = cached
        self._open_live = open_live
        self._notice = notice
        self._live: Source | None = None
        self.encoded_live: set[str] = set()

    def load(self, names: Sequence[str]) -> list[Tensors]:
        """Read or encode each sample."""
        return [self._one(name) for name in names]

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[list[Tensors]]:
        """Batches read ahead from the cache; one with a miss is loaded sample by sample, then reading ahead goes on."""
        remaining = iter(batches)
        again: deque[Sequence[str]] = deque()  # read ahead in vain when another batch had a miss
        while True:
            started: deque[Sequence[str]] = deque()  # handed to the cache, not given out yet
            try:
                for tensors in self._cached.stream(_noted(again, remaining, started)):
                    started.popleft()
                    yield tensors
                return
            except (RecordMissingError, RecordCorruptError):
                if not started:
                    raise
            yield self.load(started.popleft())
            again.extendleft(reversed(started))

    def bucket(self, name: str) -> Bucket:
        """`img_shapes`, cached or live."""
        try:
            return self._cached.bucket(name)
        except (RecordMissingError, RecordCorruptError) as error:
            return self._opened(name, error).bucket(name)

    def _one(self, name: str) -> Tensors:
        try:
            return self._cached.load([name])[0]
        except (RecordMissingError, RecordCorruptError) as error:
            return self._opened(name, error).load([name])[0]

    def _opened(self, name: str, error: Exception) -> Source:
        if self._live is None:
            self._notice(
                f"sample {name!r} is not in the cache ({error}); it and any other such sample is encoded in every step "
                "that uses it, which is slower and keeps the encoders in memory: run `dittocache cache` first"
            )
            self._live = self._open_live()
        self.encoded_live.add(name)
        return self._live


def _noted(
    again: deque[Sequence[str]], remaining: Iterator[Sequence[str]], started: deque[Sequence[str]]
) -> Iterator[Sequence[str]]:
    while True:
        names = again.popleft() if again else next(remaining, None)
        if names is None:
            return
        started.append(names)
        yield names


def with_empty_prompts(batch: Sequence[Tensors], dropped: Sequence[bool]) -> list[Tensors]:
    """The batch with the prompt artifacts of the `dropped` samples replaced by their `empty_` ones, masks included.

    Raises DataError where a dropped sample has no `empty_` artifact.
    """
    return [_emptied(sample) if drop else sample for sample, drop in zip(batch, dropped, strict=True)]


def _emptied(sample: Tensors) -> Tensors:
    empty = {name.removeprefix("empty_"): tensor for name, tensor in sample.items() if name.startswith("empty_")}
    if not empty:
        raise DataError(
            f"caption dropout needs empty prompt embeddings; the sample has only {', '.join(sorted(sample))}: "
            "cache them, or set data.caption_dropout to 0"
        )
    return {**sample, **empty}


def _rows(img_shapes: torch.Tensor) -> Bucket:
    return tuple(tuple(int(value) for value in row) for row in img_shapes.tolist())
