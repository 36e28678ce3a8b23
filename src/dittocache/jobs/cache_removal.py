"""The stage behind `cache.keep_cache: false`: what this run cached for itself goes when it has been trained on."""

from __future__ import annotations

from collections.abc import Iterable

from dittocache.embeddings.store import roots
from dittocache.embeddings.store.gc import remove_unshared
from dittocache.events import EventLog
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import CACHED_NAME


def note_cached(inputs: RunInputs, keys: Iterable[str]) -> None:
    """Note which records this run is about to encode, so that they can be removed after training."""
    with (inputs.run_dir / CACHED_NAME).open("a", encoding="ascii") as stream:
        stream.writelines(f"{key}\n" for key in sorted(keys))


def remove_cache(inputs: RunInputs, log: EventLog) -> None:
    """Remove the records that this run encoded and that no other run uses."""
    noted = inputs.run_dir / CACHED_NAME
    if not noted.exists():
        log.message("nothing to remove: this run found everything cached")
        return
    if not inputs.store.is_local:
        log.message(f"{inputs.config.cache.cache_dir} is kept: who uses it is not known behind a URL", level="warning")
        return
    keys = {key for key in noted.read_text(encoding="ascii").split() if len(key) == 32}  # the last may be torn
    manifest = inputs.manifest_path.absolute()
    own = next((root for root in roots.roots(inputs.store) if root.is_here and root.manifest == manifest), None)
    removed = remove_unshared(inputs.store, keys, own)
    noted.unlink()
    log.emit("result", **{name: value for name, value in vars(removed).items() if isinstance(value, int | float)})
