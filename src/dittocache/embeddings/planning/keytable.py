"""The keys of many samples and the recipes behind them, as a few arrays: 20 MB for 100,000 samples.

Samples of one data set are made from the same few recipes with other contents. What they share is a `Shape`: the names
of the artifacts, and for each the recipe without its inputs and how the inputs are put together from the sample's
contents. A sample is then the number of its shape, its keys `(artifacts, 16)` and its contents `(contents, 16)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from dittocache.data.digests import DIGEST_BYTES
from dittocache.embeddings.recipe import Recipe, canonical_json
from dittocache.errors import CacheError

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

_HEX_DIGITS = frozenset("0123456789abcdef")
_KINDS = frozenset({"file", "text"})
_SIBLING = "sibling:"  # stands for the key of another artifact of the same sample


class Source(NamedTuple):
    """One input of a recipe: its role, `file` or `text`, and which of the sample's contents it is."""

    role: str
    kind: str
    content: int


class Shape(NamedTuple):
    """What samples with the same artifacts, recipes and numbers of inputs have in common.

    Attributes:
        artifacts: their names, in order.
        bases: for each its recipe without inputs as canonical JSON; None where the recipe is not known.
        sources: for each its inputs; None where they stand in the base.
        contents: how many contents a sample has.
    """

    artifacts: tuple[str, ...]
    bases: tuple[str | None, ...]
    sources: tuple[tuple[Source, ...] | None, ...]
    contents: int


class Row(NamedTuple):
    """One sample: its shape, its keys one after another, and its contents one after another, as bytes."""

    name: str
    shape: Shape
    keys: bytes
    contents: bytes


@dataclass(frozen=True)
class KeyTable:
    """Keys and contents of samples in order.

    Attributes:
        names: of the samples, each once.
        shapes, shape_of: the shapes, and for each sample the number of its own `(samples,)` int64.
        keys: `(all keys, 16)` uint8, sample after sample.
        contents: `(all contents, 16)` uint8, sample after sample.
    """

    names: Sequence[str]
    shapes: Sequence[Shape]
    shape_of: Numbers
    keys: Bytes
    contents: Bytes

    @classmethod
    def of(cls, rows: Iterable[Row]) -> KeyTable:
        """The table of these rows."""
        names: list[str] = []
        numbers: dict[Shape, int] = {}
        shape_of: list[int] = []
        keys, contents = bytearray(), bytearray()
        for row in rows:
            names.append(row.name)
            shape_of.append(numbers.setdefault(row.shape, len(numbers)))
            keys += row.keys
            contents += row.contents
        return cls(names, list(numbers), np.array(shape_of, np.int64), _digests(keys), _digests(contents))

    @classmethod
    def from_mappings(
        cls, samples: Mapping[str, Mapping[str, str]], recipes: Mapping[str, Mapping[str, Any]]
    ) -> KeyTable:
        """The same from dictionaries; a recipe may be missing. Raises CacheError for what is no key."""
        return cls.of(_row(name, keys, recipes) for name, keys in samples.items())

    @cached_property
    def key_starts(self) -> Numbers:
        """Where each sample's keys begin, and where the last one's end: `(samples + 1,)`."""
        return _starts(np.array([len(shape.artifacts) for shape in self.shapes], np.int64)[self.shape_of])

    @cached_property
    def content_starts(self) -> Numbers:
        """The same for contents."""
        return _starts(np.array([shape.contents for shape in self.shapes], np.int64)[self.shape_of])

    @cached_property
    def sample_of_key(self) -> Numbers:
        """For each key the number of its sample."""
        return np.repeat(np.arange(len(self.names)), np.diff(self.key_starts))

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """The number of each sample by its name."""
        return dict(zip(self.names, range(len(self.names)), strict=True))

    def by_key(self, values: Mapping[Shape, Sequence[int]]) -> Numbers:
        """A number for each key, given the numbers of each shape's artifacts."""
        listed = [np.array(values[shape], np.int64) for shape in self.shapes]
        if len({one.tobytes() for one in listed}) == 1:
            return np.tile(listed[0], len(self.names))
        return np.concatenate([listed[number] for number in self.shape_of]) if listed else np.zeros(0, np.int64)

    def keys_of(self, row: int) -> dict[str, str]:
        """artifact name -> key of one sample."""
        start, end = self.key_starts[row], self.key_starts[row + 1]
        digits = self.keys[start:end].tobytes().hex()
        names = self.shapes[self.shape_of[row]].artifacts
        width = 2 * DIGEST_BYTES
        return {name: digits[width * number : width * (number + 1)] for number, name in enumerate(names)}

    def recipe(self, row: int, artifact: int) -> Recipe | None:
        """The recipe of one artifact (by its number) of one sample; None where it is not known."""
        shape = self.shapes[self.shape_of[row]]
        base, sources = shape.bases[artifact], shape.sources[artifact]
        if base is None:
            return None
        recipe = cast(Recipe, json.loads(base))
        if sources is not None:
            recipe["inputs"] = [
                {"role": source.role, "content": f"{source.kind}:{self.content(row, source.content)}"}
                for source in sources
            ]
        shared = _sibling(recipe)
        if shared is not None:
            recipe["storage"]["rows_shared_with"] = self.keys_of(row)[shared]
        return recipe

    def content(self, row: int, number: int) -> str:
        """One of a sample's contents as hex digits."""
        digest: bytes = self.contents[self.content_starts[row] + number].tobytes()
        return digest.hex()

    def take(self, rows: Numbers) -> KeyTable:
        """The samples of these numbers, in this order."""
        return KeyTable(
            [self.names[row] for row in rows.tolist()],
            self.shapes,
            self.shape_of[rows],
            self.keys[_spans(self.key_starts, rows)],
            self.contents[_spans(self.content_starts, rows)],
        )

    def joined(self, other: KeyTable) -> KeyTable:
        """These samples and then the other's."""
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        moved = np.array([numbers.setdefault(shape, len(numbers)) for shape in other.shapes], np.int64)
        return KeyTable(
            [*self.names, *other.names],
            list(numbers),
            np.concatenate([self.shape_of, moved[other.shape_of]]),
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.contents, other.contents]),
        )


@lru_cache(maxsize=4096)
def base_parts(base: str) -> Recipe:
    """A shape's recipe without inputs; for reading only."""
    return cast(Recipe, json.loads(base))


def split_recipe(
    recipe: Mapping[str, Any], siblings: Mapping[str, str]
) -> tuple[str, list[tuple[str, str, str]] | None]:
    """A recipe as its base and its inputs (role, kind, digest); None where the inputs have to stay in the base.

    Args:
        siblings: artifact -> key of the same sample, so that a reference to one of them is the same for all samples.
    """
    rest = dict(recipe)
    storage = rest.get("storage")
    if isinstance(storage, Mapping) and "rows_shared_with" in storage:
        named = {key: name for name, key in siblings.items()}.get(storage["rows_shared_with"])
        if named is not None:
            rest["storage"] = {**storage, "rows_shared_with": _SIBLING + named}
    inputs = rest.get("inputs")
    found: list[tuple[str, str, str]] = []
    for one in inputs if isinstance(inputs, list) else [None]:
        if not (isinstance(one, Mapping) and one.keys() == {"role", "content"}):
            return canonical_json(rest), None
        role, content = one["role"], one["content"]
        if not (isinstance(role, str) and isinstance(content, str)):
            return canonical_json(rest), None
        kind, _, digest = content.partition(":")
        if kind not in _KINDS or not is_key(digest):
            return canonical_json(rest), None
        found.append((role, kind, digest))
    del rest["inputs"]
    return canonical_json(rest), found


def sibling_reference(artifact: str) -> str:
    """How a base names the key of another artifact of the same sample."""
    return _SIBLING + artifact


def is_key(text: str) -> bool:
    """Whether this is a key or a digest: 32 hex digits."""
    return len(text) == 2 * DIGEST_BYTES and _HEX_DIGITS.issuperset(text)


def key_bytes(key: str) -> bytes:
    """The 16 bytes of a key; raises CacheError for what is none."""
    if not is_key(key):
        raise CacheError(f"{key!r} is no key; expected {2 * DIGEST_BYTES} hex digits (recipe_key)")
    return bytes.fromhex(key)


def _row(name: str, keys: Mapping[str, str], recipes: Mapping[str, Mapping[str, Any]]) -> Row:
    bases: list[str | None] = []
    sources: list[tuple[Source, ...] | None] = []
    numbers: dict[str, int] = {}
    for key in keys.values():
        recipe = recipes.get(key)
        if recipe is None:
            bases.append(None)
            sources.append(None)
            continue
        base, inputs = split_recipe(recipe, keys)
        bases.append(base)
        if inputs is None:
            sources.append(None)
        else:
            sources.append(tuple(Source(r, k, numbers.setdefault(d, len(numbers))) for r, k, d in inputs))
    shape = Shape(tuple(keys), tuple(bases), tuple(sources), len(numbers))
    return Row(name, shape, b"".join(map(key_bytes, keys.values())), b"".join(map(bytes.fromhex, numbers)))


def _sibling(recipe: Mapping[str, Any]) -> str | None:
    storage = recipe.get("storage")
    shared = storage.get("rows_shared_with") if isinstance(storage, dict) else None
    return shared.removeprefix(_SIBLING) if isinstance(shared, str) and shared.startswith(_SIBLING) else None


def _digests(content: bytes | bytearray) -> Bytes:
    return np.frombuffer(bytes(content), np.uint8).reshape(-1, DIGEST_BYTES)


def _starts(counts: Numbers) -> Numbers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _spans(starts: Numbers, rows: Numbers) -> Numbers:
    """The numbers of everything that belongs to these rows, row after row."""
    counts = starts[rows + 1] - starts[rows]
    ends = np.cumsum(counts)
    spans: Numbers = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[rows] - (ends - counts), counts)
    return spans
