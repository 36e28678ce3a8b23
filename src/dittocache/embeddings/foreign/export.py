"""The store's records as files that other tools read: the spec's layout for qflux, or one file for each sample."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dittocache.data.sample import Sample
from dittocache.embeddings.foreign.embedding_files import FORMATS, FileFormat
from dittocache.embeddings.foreign.export_layouts import ExportLayout, FlatLayout, HashedLayout
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.store.store import Store
from dittocache.embeddings.store.unavailable import unavailable
from dittocache.errors import CacheError, StoreUnavailableError
from dittocache.events import EventLog, Progress

Layout = Literal["qflux", "flat"]
LAYOUTS: tuple[Layout, ...] = ("qflux", "flat")
SHOWN = 10  # samples left out that are listed


@dataclass
class ExportResult:
    """What an export wrote, or as a plan is about to write.

    Attributes:
        folder, format, layout: where to, and how.
        dry_run: nothing was written.
        samples: how many are complete in the store.
        files: files of tensors that were, or are to be, written.
        bytes: in a plan, of the files to be written; else of all exported tensors, those included that were there.
        present: files that were there already.
        free_bytes: left on the disk before.
        left_out: samples that were not exported, and why.
        seconds: wall time.
    """

    folder: str
    format: str
    layout: str
    dry_run: bool
    samples: int = 0
    files: int = 0
    bytes: int = 0
    present: int = 0
    free_bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def describe(self) -> str:
        """The result in a few lines for a terminal."""
        lines = [f"{self.samples} samples as {self.format}, {self.layout} layout, in {self.folder}"]
        if self.dry_run:
            lines.append(f"{self.files} files, {self.bytes / 1e6:.1f} MB, to write; {self.present} are there already")
            lines.append(f"{self.free_bytes / 1e6:.1f} MB are free there")
        else:
            lines.append(f"{self.files} files written, {self.present} were there already: {self.bytes / 1e6:.1f} MB")
        if self.left_out:
            lines.append(f"{len(self.left_out)} samples are left out:")
            lines += [f"  {name}: {reason}" for name, reason in list(self.left_out.items())[:SHOWN]]
            lines += [f"  and {len(self.left_out) - SHOWN} more"] if len(self.left_out) > SHOWN else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def plan_export(
    store: Store,
    manifest: Manifest,
    folder: str | Path,
    format: FileFormat = "safetensors",
    layout: Layout = "flat",
    samples: Sequence[Sample] | None = None,
) -> ExportResult:
    """How much `export_cache` would write; nothing is written. Raises as it does."""
    files = _layout(manifest, Path(folder), format, layout, samples, replace=False)
    return _planned(store, manifest, files, Path(folder), format, layout)[0]


def export_cache(
    store: Store,
    manifest: Manifest,
    folder: str | Path,
    format: FileFormat = "safetensors",
    layout: Layout = "flat",
    samples: Sequence[Sample] | None = None,
    *,
    replace: bool = False,
    log: EventLog | None = None,
) -> ExportResult:
    """Write the records of a manifest's samples as files for other tools.

    Args:
        format: `pt` (`torch.save`) or `safetensors`.
        layout: `qflux`: `{artifact}/{hash}.EXT` and `metadata/{main_hash}.json`, the spec's layout, which qflux reads
            as `.pt`. `flat`: one `{sample}.EXT` with all artifacts by name.
        samples: of the data set, with their files; `qflux` names files by the hashes of those. `flat` needs none.
        replace: overwrite a sample's file of an earlier export (`flat`).
        log: receives progress.

    Samples that are not cached completely are left out, and with `qflux` those whose pictures or caption have changed.
    Every file appears whole or not at all; started again, an export goes on where it ended. Tensors keep their dtype
    and every bit. Raises CacheError where samples are missing for `qflux` or a file in the way holds something else,
    DataError where a source file cannot be read, StoreUnavailableError where the disk is too small or not writable,
    RecordCorruptError for a damaged record.
    """
    started = time.monotonic()
    files = _layout(manifest, Path(folder), format, layout, samples, replace)
    planned, complete = _planned(store, manifest, files, Path(folder), format, layout)
    if planned.bytes > planned.free_bytes:
        raise StoreUnavailableError(
            f"the export needs {planned.bytes / 1e6:.1f} MB, {folder} has {planned.free_bytes / 1e6:.1f} MB free: free "
            "space or choose another folder"
        )
    result = dataclasses.replace(planned, dry_run=False, files=0, bytes=0, present=0)
    progress = Progress(log, len(complete)) if log is not None else None
    for name in complete:
        tensors = {artifact: store.read(key) for artifact, key in manifest.samples[name].items()}
        with unavailable(f"sample {name!r} cannot be written to {folder}"):
            new = files.write(name, tensors)
        result.files += new
        result.present += len(files.files(name)) - new
        result.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if progress is not None:
            progress.advance()
    result.seconds = time.monotonic() - started
    return result


def _planned(
    store: Store, manifest: Manifest, files: ExportLayout, folder: Path, format: str, layout: str
) -> tuple[ExportResult, list[str]]:
    """The plan, and the names of the samples to export."""
    sizes = store.sizes(manifest.keys)
    result, complete = _begin(manifest, files, sizes, folder, format, layout)
    planned: set[Path] = set()
    for name in complete:
        for file in files.files(name):
            if file.path in planned:
                continue
            planned.add(file.path)
            if file.path.is_file():
                result.present += 1
            else:
                result.files += 1
                result.bytes += sum(sizes[manifest.samples[name][artifact]] for artifact in file.artifacts)
    return result, complete


def _layout(
    manifest: Manifest, folder: Path, format: str, layout: str, samples: Sequence[Sample] | None, replace: bool
) -> ExportLayout:
    if format not in FORMATS or layout not in LAYOUTS:
        raise CacheError(
            f"format {format!r} with layout {layout!r} is unknown; formats are {', '.join(FORMATS)}, layouts "
            f"{', '.join(LAYOUTS)}"
        )
    form: FileFormat = "pt" if format == "pt" else "safetensors"
    if layout == "flat":
        return FlatLayout(folder, manifest, form, replace)
    return HashedLayout(folder, manifest, form, samples or ())


def _begin(
    manifest: Manifest,
    files: ExportLayout,
    present: Mapping[str, int],
    folder: Path,
    format: str,
    layout: str,
) -> tuple[ExportResult, list[str]]:
    """A plan without files yet, and the names of the samples to export."""
    result = ExportResult(str(folder), format, layout, dry_run=True)
    chosen: list[str] = []
    for name, keys in manifest.samples.items():
        problem = files.problem(name) if all(key in present for key in keys.values()) else "not cached completely"
        if problem is None:
            chosen.append(name)
        else:
            result.left_out[name] = problem
    result.samples = len(chosen)
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    with unavailable(f"{folder} cannot be written"):
        result.free_bytes = shutil.disk_usage(there).free
    return result, chosen
