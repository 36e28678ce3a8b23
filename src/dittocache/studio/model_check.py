"""The draft's model: what it is, what of it is there, what is missing, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dittocache.config import BUNDLED, RunConfig, check_config
from dittocache.errors import ConfigError, listed_in
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
    """Look at the draft's checkpoint; None where none is chosen yet. Nothing is loaded or downloaded.

    Needs torch: run it on the worker.
    """
    given = {name: value for name, value in studio.draft.given.items() if name.startswith("model.")}
    if not given.get("model.path"):
        return None
    try:
        config = check_config({}, {**given, "data.path": str(studio.base)})
    except ConfigError as error:
        return ModelCheck(problems=error.problems)
    outside = [one for one in outside_problems(studio, config) if one.startswith("model.")]
    return ModelCheck(problems=tuple(outside)) if outside else _look(config)


def _look(config: RunConfig) -> ModelCheck:
    """What is in the folder of a checkpoint, and whether it can be trained."""
    from dittocache.embeddings.planning.identity import model_folder
    from dittocache.families.loading import model_index
    from dittocache.jobs.inputs import RunInputs
    from dittocache.jobs.validation import model_problems

    inputs = RunInputs(config, config.run_dir)
    problems: list[str] = []
    folder, family, pipeline, device = "", "", "", ""
    components: tuple[Component, ...] = ()
    with listed_in(problems, "model.path: "):
        folder = str(model_folder(inputs.model))
        index = model_index(folder)
        pipeline, components = str(index.get("_class_name", "")), _components(Path(folder), index)
        problems += model_problems(inputs.model)
    if folder:
        with listed_in(problems, "model.family: "):
            family = inputs.family.name
    with listed_in(problems):
        device = inputs.device
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
