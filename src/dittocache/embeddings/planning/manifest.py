"""What a run trains on: every sample's artifacts by key, and the recipes that explain the keys later.

Training reads the manifest, never a folder listing: a deleted sample is not trained, a stale record not read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dittocache.embeddings.recipe import Recipe, canonical_json
from dittocache.embeddings.store.durable import replace_file
from dittocache.errors import CacheError, StoreUnavailableError

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """sample name -> artifact name -> key, with the recipe of each key.

    Attributes:
        samples: the samples of the run, in order.
        recipes: by key; a plan compares them with new ones to say why a record is stale.
        family: name of the model family.
    """

    samples: Mapping[str, Mapping[str, str]]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    family: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """All keys that the samples need."""
        return frozenset(key for artifacts in self.samples.values() for key in artifacts.values())

    def without(self, names: Collection[str]) -> Manifest:
        """The manifest with some samples left out, for example those whose pictures could not be read."""
        kept = {name: artifacts for name, artifacts in self.samples.items() if name not in names}
        keys = Manifest(kept).keys
        return Manifest(kept, {key: recipe for key, recipe in self.recipes.items() if key in keys}, self.family)

    def save(self, path: Path) -> None:
        """Write the manifest as JSON, atomically; raises StoreUnavailableError when the folder cannot be written.

        Recipes of a data set share most of their parts: each part is written once, and a recipe as the numbers of its
        parts in the order of `fields`.
        """
        fields = sorted({name for recipe in self.recipes.values() for name in recipe})
        numbers: dict[str, int] = {}
        rows = {
            key: [numbers.setdefault(canonical_json(recipe.get(name)), len(numbers)) for name in fields]
            for key, recipe in self.recipes.items()
        }
        head = canonical_json({"version": MANIFEST_VERSION, "family": self.family, "fields": fields})
        parts = ",\n".join(numbers)
        body = json.dumps({"samples": self.samples, "recipes": rows}, separators=(",", ":"))
        content = f'{head[:-1]},\n"parts":[{parts}],\n{body[1:]}\n'
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.encode("ascii"))
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
            fields, parts = content["fields"], content["parts"]
            recipes = {
                str(key): {name: parts[number] for name, number in zip(fields, row, strict=True)}
                for key, row in content["recipes"].items()
            }
            samples = {
                str(name): {str(artifact): str(key) for artifact, key in artifacts.items()}
                for name, artifacts in content["samples"].items()
            }
            return cls(samples, recipes, str(content["family"]))
        except FileNotFoundError as error:
            raise CacheError(f"there is no manifest {path}; cache the data set first") from error
        except OSError as error:
            raise CacheError(f"the manifest {path} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"the manifest {path} is damaged ({error!r}); remove it and cache again") from error
