"""From samples to keys: what `artifact_recipe` and `recipe_key` give, without building 700,000 recipes.

Recipes of one data set differ in their inputs and in little else. The canonical text of everything else is made once;
a key is the digest of that text with the sample's inputs in their place. Tests hold it against `recipe_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from dittocache.data.digests import DIGEST_BYTES, Digests
from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.keytable import Row, Shape, Source, sibling_reference
from dittocache.embeddings.recipe import artifact_recipe, canonical_json, input_content
from dittocache.embeddings.store.storage import Storage, storage_field
from dittocache.errors import CacheError
from dittocache.families.base import Artifact, Family, Sizes

BASE_ARTIFACT = "empty_prompt_embeds"  # whose rows others may share
_INPUTS, _BASE_KEY = "\0inputs", "\0base"  # places in a recipe's canonical text; NUL is escaped in JSON


@dataclass(frozen=True)
class _Pattern:
    """The canonical text of a recipe before, between and after what differs from sample to sample."""

    base: str
    pieces: tuple[str, ...]

    def key(self, inputs: str, base_key: str) -> bytes:
        """The key of the recipe with these inputs (JSON) and this base record."""
        head, *rest = self.pieces
        text = head + inputs + (rest[0] + base_key + rest[1] if len(rest) == 2 else rest[0])
        return blake3(text.encode()).digest(length=DIGEST_BYTES)


@dataclass
class KeyMaker:
    """Makes the keys of samples, one after another.

    Attributes:
        identities: by encoder, from `encoder_identity`.
        digests: of the samples' files.
        storage: the form in which the tensors are stored.
        size_of: gives a picture's upright (width, height).
    """

    family: Family
    sizes: Sizes
    identities: Mapping[str, Mapping[str, Any]]
    digests: Digests
    storage: Storage = Storage()
    size_of: Callable[[Path], tuple[int, int]] = picture_size
    _patterns: dict[tuple[str, str | None, str, bool], _Pattern] = field(default_factory=dict)
    _roles: dict[str, str] = field(default_factory=dict)

    def row(self, sample: Sample) -> Row:
        """The sample's keys; raises DataError where the family cannot use it or a file of it cannot be read."""
        artifacts = self.family.artifacts(sample, self.sizes, self.size_of)
        contents: dict[str, int] = {}
        sources, inputs = [], []
        for artifact in artifacts:
            listed, text = self._inputs(artifact, contents)
            sources.append(listed)
            inputs.append(text)
        names = [artifact.name for artifact in artifacts]
        if len(set(names)) != len(names):
            raise CacheError(f"{self.family.name} lists an artifact twice: {', '.join(names)}; mend the family")
        keys: dict[str, bytes] = {}
        bases: dict[str, str] = {}
        # What others share rows with comes first: its key is part of theirs.
        for number in sorted(range(len(names)), key=lambda one: names[one] != BASE_ARTIFACT):
            artifact = artifacts[number]
            base_key = keys[BASE_ARTIFACT].hex() if BASE_ARTIFACT in keys else None
            pattern = self._pattern(artifact, base_key)
            bases[artifact.name] = pattern.base
            keys[artifact.name] = pattern.key(inputs[number], base_key or "")
        shape = Shape(tuple(names), tuple(bases[name] for name in names), tuple(sources), len(contents))
        return Row(
            sample.name,
            shape,
            b"".join(keys[name] for name in names),
            b"".join(map(bytes.fromhex, contents)),
        )

    def _inputs(self, artifact: Artifact, contents: dict[str, int]) -> tuple[tuple[Source, ...], str]:
        """Where the inputs stand among the sample's contents, and their canonical text."""
        sources, texts = [], []
        for one in artifact.inputs:
            content = input_content(one, self.digests)
            kind, _, digest = content.partition(":")
            sources.append(Source(one.role, kind, contents.setdefault(digest, len(contents))))
            if one.role not in self._roles:
                self._roles[one.role] = canonical_json(one.role)
            texts.append(f'{{"content":"{content}","role":{self._roles[one.role]}}}')
        return tuple(sources), f"[{','.join(texts)}]"

    def _pattern(self, artifact: Artifact, base_key: str | None) -> _Pattern:
        transform = canonical_json(dict(artifact.transform))
        known = (artifact.name, artifact.encoder, transform, base_key is not None)
        if known not in self._patterns:
            self._patterns[known] = self._new_pattern(artifact, base_key)
        return self._patterns[known]

    def _new_pattern(self, artifact: Artifact, base_key: str | None) -> _Pattern:
        identity = None if artifact.encoder is None else self.identities[artifact.encoder]
        storage = storage_field(artifact.name, self.storage, base_key)
        without_inputs = Artifact(artifact.name, artifact.encoder, (), artifact.transform)
        recipe = artifact_recipe(without_inputs, self.family.name, identity, self.digests, storage)
        del recipe["inputs"]
        marked = {**recipe, "inputs": _INPUTS}
        if storage is not None and "rows_shared_with" in storage:
            recipe["storage"] = {**storage, "rows_shared_with": sibling_reference(BASE_ARTIFACT)}
            marked["storage"] = {**storage, "rows_shared_with": _BASE_KEY}
        head, tail = canonical_json(marked).split(canonical_json(_INPUTS))
        pieces = tail.split(canonical_json(_BASE_KEY)[1:-1])  # its quotation marks stay
        return _Pattern(canonical_json(recipe), (head, *pieces))
