"""Data sets of the Hugging Face hub that this machine holds already: nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from dittocache.data.listed.arrow_source import Source, dataset_source, package
from dittocache.errors import DataError


def hub_snapshot(name: str) -> Path | None:
    """The folder in which the hub's client keeps the files of a data set; None where it has none."""
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def prepared_source(name: str) -> Source:
    """A data set that `datasets.load_dataset(name)` has prepared earlier; raises DataError where there is none."""
    absent = (
        f"{name} is no file or folder, nor a data set of the hub that this machine holds; correct the path, or fetch "
        f"it first: hf download --repo-type dataset {name}"
    )
    try:
        cached = package("datasets.packaged_modules.cache.cache")
        builder = cached.Cache(dataset_name=name.partition("/")[2], repo_id=name, version="auto", hash="auto")
        found = builder.as_dataset()
    except (OSError, ValueError) as error:  # DataError, too: without the package nothing has been prepared by it
        raise DataError(absent) from error
    return dataset_source(Path(name), Path(builder.cache_dir), found)
