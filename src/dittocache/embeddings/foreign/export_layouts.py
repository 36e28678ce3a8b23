"""Where an export puts a sample's tensors: one file for each sample, or the spec's layout by hashes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save

from dittocache.data.digests import text_digest
from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.embedding_files import (
    FileFormat,
    find_embedding,
    publish_new,
    same_value,
    stem_of,
    write_embedding,
)
from dittocache.embeddings.foreign.hashing import SourceHashes
from dittocache.embeddings.foreign.metadata import write_metadata
from dittocache.embeddings.foreign.pt_files import parse_pt, pt_bytes
from dittocache.embeddings.foreign.qflux import sample_hashes
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.store.durable import replace_file
from dittocache.errors import CacheError
from dittocache.families.base import Tensors

EMPTY = "empty_"  # begins the names of what is made of the empty prompt
_ROLES = {"target": "picture", "control": "control picture", "prompt": "caption"}


@dataclass(frozen=True)
class ExportFile:
    """A file of an export and the artifacts that it holds."""

    path: Path
    artifacts: tuple[str, ...]


class ExportLayout(Protocol):
    """Where tensors go."""

    def files(self, name: str) -> Sequence[ExportFile]:
        """The files of a sample, as they are called where nothing is in the way."""
        ...

    def problem(self, name: str) -> str | None:
        """Why a sample that is complete in the store must not be exported; raises DataError where it cannot be told."""
        ...

    def write(self, name: str, tensors: Tensors) -> int:
        """Write a sample's files and return how many were not there yet; raises CacheError, OSError."""
        ...


class FlatLayout:
    """`{folder}/{sample}.EXT` with all artifacts of the sample by name."""

    def __init__(self, folder: Path, manifest: Manifest, form: FileFormat, replace: bool) -> None:
        self._folder = folder
        self._manifest = manifest
        self._form = form
        self._replace = replace

    def files(self, name: str) -> Sequence[ExportFile]:
        """One file."""
        return [ExportFile(self._path(name), tuple(self._manifest.samples[name]))]

    def problem(self, name: str) -> str | None:
        """None: the file is named by the sample, whatever its pictures are now."""
        return None

    def write(self, name: str, tensors: Tensors) -> int:
        """Write the file; one that is there and holds the same stays."""
        path = self._path(name)
        content = pt_bytes({**tensors}) if self._form == "pt" else save(tensors, {"sample": name})
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and publish_new(path, content):
            return 1
        if _holds(path, tensors, self._form):
            return 0
        if not self._replace:
            raise CacheError(
                f"{path} holds something else than sample {name!r} does now; choose an empty folder, or replace it"
            )
        replace_file(path, content)
        return 1

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or not parts.parts or ".." in parts.parts:
            raise CacheError(f"sample {name!r} cannot name a file below {self._folder}; rename it")
        return self._folder.joinpath(*parts.parts[:-1], f"{parts.name}.{self._form}")


class HashedLayout:
    """The spec's layout: `{folder}/{artifact}/{hash}.EXT` and `{folder}/metadata/{main_hash}.json`.

    What depends on the control pictures is named by them and the prompt, so that samples share a file only where its
    content is the same. Raises CacheError for samples whose files are not given.
    """

    def __init__(self, folder: Path, manifest: Manifest, form: FileFormat, samples: Iterable[Sample]) -> None:
        self._folder = folder
        self._manifest = manifest
        self._form = form
        self._samples = {sample.name: sample for sample in samples}
        absent = [name for name in manifest.samples if name not in self._samples]
        if absent:
            raise CacheError(
                f"the qflux layout names files by the hashes of pictures and prompts; {len(absent)} samples of the "
                f"manifest are not among the given ones ({absent[0]}): give the data set's samples, or cache again"
            )
        self._sources = SourceHashes()
        self._owners: dict[str, tuple[str, Mapping[str, str]]] = {}

    def files(self, name: str) -> Sequence[ExportFile]:
        """One file for each artifact."""
        found = []
        for artifact, hash_value in self._hashes(name)[1].items():
            stem = stem_of(hash_value)
            path = find_embedding(self._folder, artifact, stem) or self._folder / artifact / f"{stem}.{self._form}"
            found.append(ExportFile(path, (artifact,)))
        return found

    def problem(self, name: str) -> str | None:
        """Whether pictures or prompt are others than those that were cached: the tensors would get their names."""
        sample = self._samples[name]
        controls = [f"file:{self._sources.digest(path)}" for path in sample.controls]
        masks = [f"file:{self._sources.digest(sample.mask)}"] if sample.mask else []
        now = {"target": [f"file:{self._sources.digest(sample.target)}"], "control": controls, "mask": masks}
        for artifact, key in self._manifest.samples[name].items():
            texts = [] if artifact.startswith(EMPTY) else [f"text:{text_digest(sample.prompt)}"]
            cached: dict[str, list[str]] = {}
            for one in self._manifest.recipes[key]["inputs"]:
                cached.setdefault(one["role"], []).append(one["content"])
            for role, contents in cached.items():
                if contents != now.get(role, texts or contents):
                    return f"its {_ROLES.get(role, role)} has changed since it was cached: cache again"
        return None

    def write(self, name: str, tensors: Tensors) -> int:
        """Write the tensors, and then the metadata that names them."""
        main_hash, hashes = self._hashes(name)
        new, stems = 0, {}
        for artifact, tensor in tensors.items():
            stem = stem_of(hashes[artifact])
            before = find_embedding(self._folder, artifact, stem)
            stems[artifact] = write_embedding(self._folder, artifact, hashes[artifact], tensor, self._form)
            new += before is None or stems[artifact] != stem
        other, other_stems = self._owners.setdefault(main_hash, (name, stems))
        if other_stems != stems:
            raise CacheError(
                f"samples {other!r} and {name!r} have the same target, first control picture and prompt: the layout "
                "has one name for both. Use the flat layout, or leave one of them out"
            )
        write_metadata(self._folder, main_hash, stems)
        return new

    def _hashes(self, name: str) -> tuple[str, dict[str, str]]:
        """The sample's hash, and the one that names each of its artifacts."""
        hashes = sample_hashes(self._samples[name], self._sources)
        prompt = hashes["prompt_hash"]
        named: dict[str, str] = {}
        for artifact, key in self._manifest.samples[name].items():
            recipe = self._manifest.recipes[key]
            roles = {one["role"] for one in recipe["inputs"]}
            if recipe["encoder"] is None:
                named[artifact] = hashes["main_hash"]
            elif artifact == "image_latents":
                named[artifact] = hashes["image_hash"]
            elif artifact == "control_latents":
                named[artifact] = hashes["controls_sum_hash"]
            else:
                named[artifact] = hashes["controls_sum_hash"] + prompt if "control" in roles else prompt
        return hashes["main_hash"], named


def _holds(path: Path, tensors: Tensors, form: FileFormat) -> bool:
    """Whether a file holds these tensors; a damaged one does not."""
    content = path.read_bytes()
    try:
        found = parse_pt(content, str(path)) if form == "pt" else load(content)
    except (CacheError, SafetensorError):
        return False
    return same_value(found, {**tensors})
