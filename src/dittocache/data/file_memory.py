"""What is remembered of a set's files from one load to the next, in one file for each set."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from dittocache.data.columns import Columns, load_columns, save_columns
from dittocache.data.digests import DIGEST_BYTES
from dittocache.data.file_samples import FileSamples
from dittocache.data.file_table import FileTable
from dittocache.data.layout import Layout

MEMORY_VERSION = 2


def remembered(memory: Path | None, place: str, root: Path) -> tuple[FileTable, Layout | None]:
    """What an earlier load has left; nothing when there is none, or it is damaged or of another version.

    Args:
        memory: the folder of memories; None where nothing is remembered.
        place: `FileSamples.place`.
        root: below which the files are.
    """
    nothing = FileTable.scanned(root, [], lambda _: True), None
    if memory is None:
        return nothing
    try:
        head, columns = load_columns(_file(memory, place))
        if head["version"] != MEMORY_VERSION:
            return nothing
        table = FileTable.from_columns(root, head["files"], columns)
        layout = None if head["layout"] is None else Layout.from_columns(head["layout"], columns)
    except (OSError, ValueError, KeyError, TypeError):
        return nothing  # everything in it can be read again
    return table, layout


def remember(samples: FileSamples, *, layout: bool = True) -> None:
    """Save what was learnt about the files, if anything was and the samples were loaded with a memory.

    A memory that cannot be written costs time only, and is told in `samples.notes`.

    Args:
        layout: False leaves the layout out, so that it is found again by the next load.
    """
    if not samples.table.altered or samples.memory is None:
        return
    table = samples.table
    files, columns = table.to_columns()
    kept = layout and samples.layout.prompts is None
    layout_head, layout_columns = samples.layout.to_columns() if kept else (None, Columns())
    head = {"version": MEMORY_VERSION, "files": files, "layout": layout_head}
    file = _file(samples.memory, samples.place)
    try:
        save_columns(file, head, {**columns, **layout_columns})
    except OSError as error:
        note = f"the files of {table.root} will be read again next time: {file} ({error.strerror or error})"
        samples.notes.append(note)
    else:
        table.altered = False


def _file(memory: Path, place: str) -> Path:
    name = blake3(place.encode("utf-8", "surrogatepass")).hexdigest(length=DIGEST_BYTES)
    return memory / f"files-{name}.columns"
