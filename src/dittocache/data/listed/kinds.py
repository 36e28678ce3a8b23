"""Which kind of data set a path is, told from names alone: nothing is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

Kind = Literal["csv", "jsonl", "json", "imagefolder", "parquet", "saved", "hub", "folder"]

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_TRAIN = "train"
_ENDINGS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def kind_of(path: Path) -> Kind:
    """What a data set at this path is.

    csv, jsonl, json: a table in one file (`.tsv` and `.ndjson` too).
    imagefolder: a folder of pictures with metadata.jsonl or metadata.csv in it, or in its folder `train`.
    parquet: a file, or a folder with such files in it or below it.
    saved: what `save_to_disk` of the package datasets has written, with splits or without.
    hub: `user/name`, a data set of the Hugging Face hub, where no file or folder is called so.
    folder: anything else; `data/folder.py` reads it, or says why not.
    """
    if path.is_dir():
        return _kind_of_folder(path)
    kind = _ENDINGS.get(path.suffix.lower())
    if kind is not None:
        return kind
    return "hub" if not path.exists() and _HUB_ID.fullmatch(path.as_posix()) else "folder"


def metadata_file(folder: Path) -> Path | None:
    """The list of a folder of pictures: its own, else that of its folder `train`."""
    places = (folder / name for folder in (folder, folder / _TRAIN) for name in METADATA_NAMES)
    return next((place for place in places if place.is_file()), None)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files below a folder by name; only those of the split `train` where there are several splits."""
    files = [Path(base, name) for base, _, names in os.walk(folder) for name in names if name.endswith(".parquet")]
    files = sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return [file for file in files if _says_train(file.relative_to(folder))] or files


def _kind_of_folder(folder: Path) -> Kind:
    if (folder / "dataset_dict.json").is_file():
        return "saved"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return "saved"
    if metadata_file(folder) is not None:
        return "imagefolder"
    return "parquet" if _holds_parquet(folder) else "folder"


def _holds_parquet(folder: Path) -> bool:
    """Whether parquet files lie in the folder, or up to two below it, as on the hub (`data/`, `default/train/`)."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))


def _says_train(file: Path) -> bool:
    """Whether a file is of the split `train` by its name or a folder's: `train-00000-of-00002`, `train/0000`."""
    return any(_TRAIN in re.split(r"[\W_]+", part.lower()) for part in (*file.parts[:-1], file.stem))
