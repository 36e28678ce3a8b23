"""Who encodes: the digest of an encoder's class, configuration, weights and the components beside it.

Weights are identified by their content, not by the model's name: a fine-tuned encoder in the same folder is another
encoder, the same encoder in another folder is the same. The stat index spares reading gigabytes in every plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from dittocache.data.digests import DIGEST_BYTES, ContentIndex, Digests
from dittocache.embeddings.recipe import canonical_json
from dittocache.errors import DataError, ModelError

WEIGHT_ENDINGS = (".safetensors", ".bin")  # in the order in which from_pretrained prefers them
SETTING_ENDINGS = frozenset({".json", ".txt", ".model", ".jinja"})
# What saving a component again writes differently without changing what it computes.
_PROVENANCE = frozenset({"_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version"})
# The data type that weights were saved in; the one they are loaded in has a field of its own.
_SAVED_DTYPE = frozenset({"dtype", "torch_dtype"})


def model_folder(model: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, or where the hub's local cache has it; nothing is downloaded.

    Raises ModelError when it is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"there is no folder {str(model)!r}, and it is no id of a model on the hub either") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {str(model)!r} is neither a folder nor in the local cache of the Hugging Face hub; "
            f"download it first: hf download {model}"
        ) from error


def encoder_identity(
    model: str | Path, component: str, beside: Sequence[str], dtype: torch.dtype, index: Digests
) -> dict[str, Any]:
    """What determines the output of one encoder of a checkpoint, as recipe values.

    Args:
        model: folder of the checkpoint, or the id of one in the hub's local cache.
        component: the encoder's name in the pipeline: `vae`, `text_encoder`, ...
        beside: components that take part in the encoding: tokenizer, processor.
        dtype: the data type that the encoder computes in.
        index: gives the digests of the checkpoint's files.

    Raises ModelError when the checkpoint is missing or incomplete.
    """
    folder = model_folder(model)
    classes = _read_json(folder / "model_index.json")
    config = _read_json(_component_folder(folder, component, classes) / "config.json")
    return {
        "component": component,
        "class": list(classes[component]),
        "config": _joint_digest(_what_computes(config)),
        "weights": _joint_digest(_file_digests(_weight_files(folder / component), index)),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": config.get("quantization_config"),
        "beside": {name: _beside_identity(folder, name, classes, index) for name in beside},
    }


def _what_computes(config: Any) -> Any:
    """The configuration without what does not take part in computing, nested ones (text, vision) alike."""
    if not isinstance(config, dict):
        return config
    return {name: _what_computes(value) for name, value in config.items() if name not in _PROVENANCE | _SAVED_DTYPE}


def _beside_identity(folder: Path, name: str, classes: dict[str, Any], index: Digests) -> dict[str, Any]:
    files = [
        file
        for file in sorted(_component_folder(folder, name, classes).iterdir())
        if file.suffix in SETTING_ENDINGS and file.is_file()
    ]
    if not files:
        raise ModelError(f"{folder / name} holds no file of a tokenizer or processor; the checkpoint is incomplete")
    return {"class": list(classes[name]), "files": _joint_digest(_file_digests(files, index))}


def _component_folder(folder: Path, name: str, classes: dict[str, Any]) -> Path:
    entry = classes.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise ModelError(f"{folder / 'model_index.json'} names no component {name!r}; choose the family of this model")
    if not (folder / name).is_dir():
        raise ModelError(f"{folder} has no folder {name!r}; the checkpoint is incomplete: download it again")
    return folder / name


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; all shards of an index must be there."""
    for ending in WEIGHT_ENDINGS:
        files = sorted(file for file in folder.iterdir() if file.suffix == ending and file.is_file())
        if not files:
            continue
        present = {file.name for file in files}
        for shard_index in sorted(folder.glob(f"*{ending}.index.json")):
            absent = sorted(set(_read_json(shard_index).get("weight_map", {}).values()) - present)
            if absent:
                raise ModelError(f"{folder} lacks {', '.join(absent)}, named in {shard_index.name}; download it again")
        return files
    raise ModelError(f"{folder} holds no weights ({' or '.join(WEIGHT_ENDINGS)}); the checkpoint is incomplete")


def _file_digests(files: Sequence[Path], index: Digests) -> dict[str, str]:
    if isinstance(index, ContentIndex):
        index.read_ahead(files)
    try:
        return {file.name: index.digest(file) for file in files}
    except DataError as error:
        raise ModelError(f"the checkpoint is incomplete: {error}") from error


def _joint_digest(values: dict[str, Any]) -> str:
    return str(blake3(canonical_json(values).encode()).hexdigest(length=DIGEST_BYTES))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; expected the folder of a diffusers checkpoint") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; download the checkpoint again")
    return content
