"""The draft's model: what it is, what of it is there, what is missing, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dittocache.config import BUNDLED
from dittocache.errors import DittocacheError
from dittocache.studio.state import Studio
from dittocache.studio.training import outside_problems


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint.

    Attributes:
        name: `transformer`, `vae`, ...
        kind: its class.
        weight_bytes: of its weights' files; 0 where it has none.
        role: what it is needed for.
    """

    name: str
    kind: str
    weight_bytes: int
    role: str


@dataclass(frozen=True)
class ModelCheck:
    """What is known of a checkpoint without loading it.

    Attributes:
        folder: where its files are.
        family: name of its family; empty where it has none.
        pipeline: class of its diffusers pipeline.
        device: where it will run.
        components: in the order of the checkpoint.
        problems: what is missing or wrong.
    """

    folder: str = ""
    family: str = ""
    pipeline: str = ""
    device: str = ""
    components: tuple[Component, ...] = ()
    problems: tuple[str, ...] = ()


def check_model(studio: Studio) -> ModelCheck | None:
    """Look at the draft's checkpoint; None where none is chosen yet. Nothing is loaded or downloaded."""
    if not studio.draft.given.get("model.path"):
        return None
    problems: list[str] = []
    try:
        config = studio.config({"data.path": str(studio.base), "data.sets": None})
        outside = [one for one in outside_problems(studio, config) if one.startswith("model.path")]
    except DittocacheError as error:
        named = [one for one in error.problems if one.startswith("model.")]
        if named:
            return ModelCheck(problems=tuple(named))
        from dittocache.config import check_config

        given = {name: value for name, value in studio.draft.given.items() if name.startswith("model.")}
        config = check_config({}, {**given, "data.path": str(studio.base)})
        outside = [one for one in outside_problems(studio, config) if one.startswith("model.path")]
    if outside:
        return ModelCheck(problems=tuple(outside))
    from dittocache.embeddings.planning.identity import model_folder
    from dittocache.families.loading import model_index
    from dittocache.jobs.inputs import RunInputs
    from dittocache.jobs.validation import model_problems

    inputs = RunInputs(config, config.run_dir)
    folder, family, pipeline, device = "", "", "", ""
    components: tuple[Component, ...] = ()
    try:
        folder = str(model_folder(inputs.model))
        index = model_index(folder)
        pipeline = str(index.get("_class_name", ""))
        components = _components(Path(folder), index)
        problems += model_problems(inputs.model)
    except DittocacheError as error:
        problems.append(f"model.path: {error}")
    try:
        family = inputs.family.name if folder else ""
    except DittocacheError as error:
        problems.append(f"model.family: {error}")
    try:
        device = inputs.device
    except DittocacheError as error:
        problems += error.problems or [str(error)]
    return ModelCheck(folder, family, pipeline, device, components, tuple(dict.fromkeys(problems)))


def known_models() -> list[str]:
    """What can be chosen at once: the bundled model, and what the Hugging Face hub's local cache holds."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = sorted(
            repo.repo_id
            for repo in scan_cache_dir().repos
            if repo.repo_type == "model"
            and any(file.file_name == "model_index.json" for revision in repo.revisions for file in revision.files)
        )
    except (CacheNotFound, OSError, ValueError):
        found = []
    return [BUNDLED, *found]


def known_families() -> list[str]:
    """Every family that a checkpoint can be said to be of."""
    from dittocache.families.registry import FAMILIES

    return sorted(FAMILIES)


def _components(folder: Path, index: dict[str, object]) -> tuple[Component, ...]:
    found = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or len(entry) != 2 or entry[1] is None:
            continue
        weights = [file for ending in ("*.safetensors", "*.bin") for file in (folder / name).glob(ending)]
        size = sum(file.stat().st_size for file in weights)
        found.append(Component(name, str(entry[1]), size, _role(name)))
    return tuple(found)


def _role(name: str) -> str:
    if name == "transformer":
        return "trained and sampled; the only one in memory while training on the cache"
    if name == "vae":
        return "encodes pictures before training, decodes them when sampling"
    if name.startswith("text_encoder"):
        return "encodes prompts before training"
    return ""
