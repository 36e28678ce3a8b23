"""From everything that determines a tensor to its key.

A recipe is a JSON object; its key is the blake3 digest (128 bits) of its canonical form: keys sorted, no spaces, ASCII.
Change anything in the recipe and the key changes; nothing else changes it. Fields:

    schema      version of this page
    artifact    `image_latents`, `prompt_embeds`, ...
    family      name of the model family
    encoder     who computes it (`encoder_identity`); null for plain facts such as `img_shapes`
    inputs      [{role, content}] in order: digests of files' contents, or of a text's UTF-8 bytes
    transform   resolved settings of the way from file to encoder
    libraries   major.minor of the libraries whose code takes part
    storage     the form in which the tensor is stored (`storage_field`); absent for the encoder's own dtype
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from blake3 import blake3

from dittocache.data.digests import DIGEST_BYTES, Digests, text_digest
from dittocache.errors import DataError
from dittocache.families.base import Artifact, ArtifactInput

SCHEMA = 1

Recipe = dict[str, Any]


def artifact_recipe(
    artifact: Artifact,
    family_name: str,
    identity: Mapping[str, Any] | None,
    digests: Digests,
    storage: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of one artifact of one sample.

    Args:
        identity: of the artifact's encoder, by `encoder_identity`; None where no encoder takes part.
        digests: gives the digests of input files.
        storage: the form in which it is stored; None for the encoder's own dtype.

    Raises DataError when an input file cannot be read.
    """
    recipe = {
        "schema": SCHEMA,
        "artifact": artifact.name,
        "family": family_name,
        "encoder": None if identity is None else dict(identity),
        "inputs": [{"role": one.role, "content": input_content(one, digests)} for one in artifact.inputs],
        "transform": dict(artifact.transform),
        "libraries": _libraries(identity),
    }
    return recipe if storage is None else {**recipe, "storage": dict(storage)}


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """The recipe's key: 32 hex digits. Raises TypeError or ValueError for values that JSON cannot hold exactly."""
    return canonical_key(canonical_json(recipe))


def canonical_key(text: str) -> str:
    """The key of a recipe that is in its canonical form already."""
    return str(blake3(text.encode()).hexdigest(length=DIGEST_BYTES))


def canonical_json(value: Any) -> str:
    """One text for one value, whatever the order in which its objects were built."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def input_content(one: ArtifactInput, digests: Digests) -> str:
    """`file:` or `text:` and the digest of what an artifact is made from; raises DataError as `artifact_recipe`."""
    if (one.file is None) == (one.text is None):
        raise DataError(f"input {one.role!r} of an artifact must have either a file or a text")
    if one.file is not None:
        return f"file:{digests.digest(one.file)}"
    return f"text:{text_digest(one.text or '')}"


def _libraries(identity: Mapping[str, Any] | None) -> dict[str, str]:
    """diffusers computes sizes and latents; transformers takes part where one of its classes does."""
    libraries = {"diffusers"}
    if identity is not None:
        parts = [identity, *identity["beside"].values()]
        libraries |= {part["class"][0] for part in parts} & {"transformers"}
    return {name: library_version(name) for name in sorted(libraries)}


@cache
def library_version(name: str) -> str:
    """major.minor of an installed library: a patch release is trusted not to change what is computed."""
    return ".".join(version(name).split(".")[:2])
