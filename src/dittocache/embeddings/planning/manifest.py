"""What a run trains on: every sample's artifacts by key, and the recipes that explain the keys later.

Training reads the manifest, never a folder listing: a deleted sample is not trained, a stale record not read.

In memory and on disk it is a `KeyTable`; samples and recipes are made from it when they are asked for, so that the
manifest of 100,000 samples loads in a fraction of a second. The file is JSON:

    version, family
    names       of the samples, in order
    fields      names of the fields of recipes; `parts` their values, each once
    bases       recipes without inputs: for each field the number of its part
    shapes      {artifacts, bases, sources, contents}: see `Shape`; null for a base that is not known
    columns     hex digits: `shape_of` (4 bytes a sample, little-endian), `keys` and `contents` (16 bytes each)
    check       xxh3-128 of the three columns and everything else
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dittocache.data.digests import DIGEST_BYTES
from dittocache.embeddings.planning.keyindex import KeyIndex
from dittocache.embeddings.planning.keytable import KeyTable, Shape, Source, base_parts, is_key
from dittocache.embeddings.recipe import Recipe, canonical_json
from dittocache.embeddings.store.durable import replace_file
from dittocache.errors import CacheError, StoreUnavailableError

MANIFEST_VERSION = 2


class Manifest:
    """sample name -> artifact name -> key, with the recipe of each key.

    Args:
        samples: the samples of the run, in order.
        recipes: by key; a plan compares them with new ones to say why a record is stale.
        family: name of the model family.

    Raises CacheError for a key that is none.
    """

    def __init__(
        self,
        samples: Mapping[str, Mapping[str, str]],
        recipes: Mapping[str, Recipe] | None = None,
        family: str = "",
    ) -> None:
        self._set(KeyTable.from_mappings(samples, recipes or {}), family)

    @classmethod
    def of_table(cls, table: KeyTable, family: str) -> Manifest:
        """The manifest of the samples of a table."""
        manifest = cls.__new__(cls)
        manifest._set(table, family)
        return manifest

    def _set(self, table: KeyTable, family: str) -> None:
        self.table = table
        self.family = family
        self.index = KeyIndex(table.keys)

    @property
    def samples(self) -> Mapping[str, Mapping[str, str]]:
        """The samples in order, each artifact name -> key."""
        return _Samples(self.table)

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """What each key stands for, as far as it is known."""
        return _Recipes(self.table, self.index)

    @property
    def keys(self) -> frozenset[str]:
        """All keys that the samples need."""
        return frozenset(self.index)

    def without(self, names: Collection[str]) -> Manifest:
        """The manifest with some samples left out, for example those whose pictures could not be read."""
        left_out = set(names)
        kept = [row for row, name in enumerate(self.table.names) if name not in left_out]
        return Manifest.of_table(self.table.take(np.array(kept, np.int64)), self.family)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        same_samples = list(self.samples.items()) == list(other.samples.items())
        return same_samples and self.family == other.family and dict(self.recipes) == dict(other.recipes)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Manifest({len(self.table.names)} samples, family={self.family!r})"

    def save(self, path: Path) -> None:
        """Write the manifest, atomically; raises StoreUnavailableError when the folder cannot be written."""
        head = {
            "version": MANIFEST_VERSION,
            "family": self.family,
            **shapes_to_json(self.table.shapes),
            "names": list(self.table.names),
        }
        columns = _column_bytes(self.table)
        content = {
            **head,
            "columns": {name: column.hex() for name, column in columns.items()},
            "check": _check(columns, head),
        }
        lines = ",\n".join(f"{json.dumps(name)}:{canonical_json(value)}" for name, value in content.items())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, f"{{{lines}}}\n".encode("ascii"))
        except OSError as error:
            raise StoreUnavailableError(
                f"the manifest {path} cannot be written ({error.strerror or error}); free space, or save it elsewhere"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest; raises CacheError when there is none, or it is damaged or of another version."""
        try:
            content: Any = json.loads(path.read_bytes())
            version = content["version"]
            if version != MANIFEST_VERSION:
                raise CacheError(
                    f"the manifest {path} has version {version!r}; expected {MANIFEST_VERSION}: cache again"
                )
            names = [str(name) for name in content["names"]]
            columns = {name: bytes.fromhex(digits) for name, digits in content["columns"].items()}
            if _check(columns, content) != content["check"]:
                raise ValueError("it does not match its checksum")
            table = KeyTable(
                names,
                shapes_from_json(content),
                np.frombuffer(columns["shape_of"], "<u4").astype(np.int64),
                np.frombuffer(columns["keys"], np.uint8).reshape(-1, DIGEST_BYTES),
                np.frombuffer(columns["contents"], np.uint8).reshape(-1, DIGEST_BYTES),
            )
            check_table(table)
            return cls.of_table(table, str(content["family"]))
        except FileNotFoundError as error:
            raise CacheError(f"there is no manifest {path}; cache the data set first") from error
        except OSError as error:
            raise CacheError(f"the manifest {path} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"the manifest {path} is damaged ({error!r}); remove it and cache again") from error


class _Samples(Mapping[str, Mapping[str, str]]):
    def __init__(self, table: KeyTable) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Mapping[str, str]:
        return self._table.keys_of(self._table.row_of[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.names)

    def __len__(self) -> int:
        return len(self._table.names)

    def __contains__(self, name: object) -> bool:
        return name in self._table.row_of


class _Recipes(Mapping[str, Recipe]):
    def __init__(self, table: KeyTable, index: KeyIndex) -> None:
        self._table = table
        self._index = index

    def __getitem__(self, key: str) -> Recipe:
        recipe = self._recipe(self._index.position(bytes.fromhex(key))) if is_key(key) else None
        if recipe is None:
            raise KeyError(key)
        return recipe

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._index if self._recipe(self._index.position(bytes.fromhex(key))) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _recipe(self, position: int | None) -> Recipe | None:
        if position is None:
            return None
        row = int(self._table.sample_of_key[position])
        return self._table.recipe(row, position - int(self._table.key_starts[row]))


def shapes_to_json(shapes: Collection[Shape]) -> dict[str, Any]:
    """Shapes as JSON values: what their recipes share is written once."""
    bases = list(dict.fromkeys(base for shape in shapes for base in shape.bases if base is not None))
    fields = sorted({name for base in bases for name in base_parts(base)})
    numbers: dict[str, int] = {}
    rows = [
        [numbers.setdefault(canonical_json(parts[name]), len(numbers)) if name in parts else None for name in fields]
        for parts in map(base_parts, bases)
    ]
    base_numbers = {base: number for number, base in enumerate(bases)}
    return {
        "fields": fields,
        "parts": [json.loads(part) for part in numbers],
        "bases": rows,
        "shapes": [
            {
                "artifacts": shape.artifacts,
                "bases": [None if base is None else base_numbers[base] for base in shape.bases],
                "sources": shape.sources,
                "contents": shape.contents,
            }
            for shape in shapes
        ],
    }


def shapes_from_json(content: Mapping[str, Any]) -> list[Shape]:
    """The reverse; raises ValueError, KeyError, IndexError or TypeError for what `shapes_to_json` did not write."""
    fields, parts = content["fields"], content["parts"]
    bases = [
        canonical_json({name: parts[at] for name, at in zip(fields, row, strict=True) if at is not None})
        for row in content["bases"]
    ]
    shapes = []
    for one in content["shapes"]:
        sources = tuple(
            None if listed is None else tuple(Source(str(role), str(kind), int(at)) for role, kind, at in listed)
            for listed in one["sources"]
        )
        artifacts = tuple(str(name) for name in one["artifacts"])
        known = tuple(None if number is None else bases[number] for number in one["bases"])
        if not len(artifacts) == len(known) == len(sources):
            raise ValueError("a shape has not as many bases and sources as artifacts")
        shapes.append(Shape(artifacts, known, sources, int(one["contents"])))
    return shapes


def check_table(table: KeyTable) -> None:
    """Raise ValueError where the parts of a table that was read from a file do not fit together."""
    if len(table.shape_of) != len(table.names) or len(table.row_of) != len(table.names):
        raise ValueError("names and rows differ in number, or a name stands twice")
    if len(table.shape_of) and not 0 <= table.shape_of.min() <= table.shape_of.max() < len(table.shapes):
        raise ValueError("a sample has a shape that does not exist")
    if len(table.keys) != table.key_starts[-1] or len(table.contents) != table.content_starts[-1]:
        raise ValueError("keys or contents are missing")
    for shape in table.shapes:
        if any(not 0 <= one.content < shape.contents for sources in shape.sources if sources for one in sources):
            raise ValueError("a recipe names a content that does not exist")


def _column_bytes(table: KeyTable) -> dict[str, bytes]:
    return {
        "shape_of": table.shape_of.astype("<u4").tobytes(),
        "keys": table.keys.tobytes(),
        "contents": table.contents.tobytes(),
    }


def _check(columns: Mapping[str, bytes], head: Mapping[str, Any]) -> str:
    hasher = xxhash.xxh3_128()
    for name in ("shape_of", "keys", "contents"):
        hasher.update(columns[name])
    rest = {name: value for name, value in head.items() if name not in ("columns", "check")}
    hasher.update(canonical_json(rest).encode())
    return hasher.hexdigest()
