"""Samples from a folder of pictures, checked in full before any model is loaded.

    SET/training_images/x.png            the target; also images/, target_images/, target/ or targets/
    SET/training_images/x.txt            its caption (UTF-8)
    SET/control_images/x.png             what it is made from; also control/, condition_images/ or controls/
    SET/control_images/x_control_1.png   further control pictures, in the order of their numbers
    SET/control_images/x_mask.png        optional loss mask; it may stand beside the target too

Without a folder of control pictures the set is for text to image. Targets may lie in sub-folders; controls then lie in
sub-folders of the same names. Endings may be those of `pictures.ENDINGS`, in any mixture.

With a folder for its memory, what was read of an unchanged file is not read again (`file_table.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from dittocache.data.columns import Columns, load_columns, save_columns
from dittocache.data.config import DataConfig
from dittocache.data.digests import DIGEST_BYTES
from dittocache.data.file_table import FileTable
from dittocache.data.folder_layout import ABSENT, FolderLayout, find_layout
from dittocache.data.folder_samples import FolderSamples
from dittocache.data.pictures import ENDINGS
from dittocache.errors import DataError

TARGET_FOLDERS = ("training_images", "images", "target_images", "target", "targets")
CONTROL_FOLDERS = ("control_images", "control", "condition_images", "controls")
MEMORY_VERSION = 1
CAPTION_ENDING = ".txt"


def load_folder(config: DataConfig, size_multiple: int, memory: Path | None = None) -> FolderSamples:
    """The samples of `config.path` in the order of their names, each with the (width, height) of its bucket.

    Args:
        config: where the set is, and its resolution in pixels.
        size_multiple: the sides of buckets are multiples of this many pixels (`Family.size_multiple`).
        memory: folder in which what is read is remembered for the next time; a damaged memory is started afresh, one
            that cannot be written is noted in `FolderSamples.notes`.

    Raises DataError listing every problem of the set: missing or empty captions, pictures that cannot be read, missing
    controls, no samples at all.
    """
    problems: list[str] = []
    target_folder = _layout_folder(config.path, TARGET_FOLDERS, problems)
    control_folder = _layout_folder(config.path, CONTROL_FOLDERS, problems)
    if problems:
        raise DataError(f"the data set {config.path} cannot be used", problems)
    if target_folder is None:
        raise DataError(
            f"the data set {config.path} has no folder of target pictures; expected one of "
            f"{', '.join(TARGET_FOLDERS)} inside it"
        )
    folders = [target_folder, *([control_folder] if control_folder is not None else [])]
    table = FileTable.scanned(config.path, folders, lambda ending: ending not in ENDINGS and ending != CAPTION_ENDING)
    memory_file = None if memory is None else _memory_file(memory, config.path)
    known, known_layout = _remembered(memory_file, config.path)
    table.learn(known)
    controls_prefix = None if control_folder is None else f"{control_folder.name}/"
    if known_layout is not None and known.names == table.names:
        layout = known_layout
    else:
        layout = find_layout(table, f"{target_folder.name}/", controls_prefix, problems)
    samples = FolderSamples(table, layout, config.resolution, size_multiple, memory)
    problems += _problems(samples, control_folder)
    if not problems and not len(samples):
        problems.append(f"{target_folder} holds no picture; expected files ending in {', '.join(sorted(ENDINGS))}")
    if table.altered and memory_file is not None:
        # A layout with problems is found again, and they with it.
        samples.notes += _remember(memory_file, table, layout if not problems else None)
    if problems:
        raise DataError(f"the data set {config.path} has {len(problems)} problem(s)", problems)
    return samples


def save_memory(samples: FolderSamples) -> None:
    """Remember what was learnt about the files since they were loaded, if they were loaded with a memory."""
    if samples.table.altered and samples.memory is not None:
        file = _memory_file(samples.memory, samples.table.root)
        samples.notes += _remember(file, samples.table, samples.layout)


def _problems(samples: FolderSamples, control_folder: Path | None) -> list[str]:
    """Read what is not known of the files that samples are made of, and tell what is wrong with them."""
    table, layout = samples.table, samples.layout
    pictures = np.concatenate([layout.targets, layout.controls, layout.masks[layout.masks != ABSENT]])
    table.read_sizes(pictures)
    unread: npt.NDArray[np.bool_] = np.logical_not(table.sizes.all(axis=1))
    wanting = layout.captions == ABSENT
    wanting |= unread[layout.targets] | ((layout.masks != ABSENT) & unread[layout.masks])
    controls = np.diff(layout.control_starts)
    if control_folder is not None:
        wanting |= controls == 0
    bad_controls = np.repeat(np.arange(len(layout.names)), controls)[unread[layout.controls]]
    wanting[bad_controls] = True
    has_text = np.zeros(len(table.names), np.bool_)
    has_text[[row for row, text in table.texts.items() if text]] = True
    wanting |= ~has_text[layout.captions]
    problems: list[str] = []
    for number in np.flatnonzero(wanting).tolist():
        problems += _sample_problems(samples, number, control_folder)
    return problems


def _sample_problems(samples: FolderSamples, number: int, control_folder: Path | None) -> list[str]:
    table, layout = samples.table, samples.layout
    target = table.path(int(layout.targets[number]))
    found = _caption_problems(table, int(layout.captions[number]), target)
    controls = layout.controls_of(number)
    if control_folder is not None and not controls:
        found.append(f"{target}: no control picture {layout.names[number]}.* in {control_folder}")
    mask = int(layout.masks[number])
    for row in (int(layout.targets[number]), *controls, *([mask] if mask != ABSENT else [])):
        try:
            table.size(row)
        except DataError as error:
            found.append(str(error))
    return found


def _caption_problems(table: FileTable, caption: int, target: Path) -> list[str]:
    if caption == ABSENT:
        return [f"{target}: no caption; expected it in {target.with_suffix(CAPTION_ENDING).name} beside it"]
    try:
        words = table.text(caption)
    except DataError as error:
        return [str(error)]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{table.path(caption)}: the caption cannot be read as UTF-8 ({error})"]
    return [] if words else [f"{table.path(caption)}: the caption is empty"]


def _layout_folder(path: Path, names: Sequence[str], problems: list[str]) -> Path | None:
    """The one folder of these names inside `path`; None when there is none."""
    if not path.is_dir():
        problem = f"{path} is not a folder; set data.path to the folder of the data set"
        if problem not in problems:
            problems.append(problem)
        return None
    present = [path / name for name in names if (path / name).is_dir()]
    if len(present) > 1:
        problems.append(f"{' and '.join(folder.name for folder in present)} both exist; keep one of them")
    return present[0] if present else None


def _memory_file(memory: Path, folder: Path) -> Path:
    name = blake3(str(folder.resolve()).encode("utf-8", "surrogatepass")).hexdigest(length=DIGEST_BYTES)
    return memory / f"files-{name}.columns"


def _remembered(memory: Path | None, root: Path) -> tuple[FileTable, FolderLayout | None]:
    """What an earlier load has left; nothing when there is none, or it is damaged or of another version."""
    nothing = FileTable.scanned(root, [], lambda _: True), None
    if memory is None:
        return nothing
    try:
        head, columns = load_columns(memory)
        if head["version"] != MEMORY_VERSION:
            return nothing
        table = FileTable.from_columns(root, head["files"], columns)
        layout = None if head["layout"] is None else FolderLayout.from_columns(head["layout"], columns)
    except (OSError, ValueError, KeyError, TypeError):
        return nothing  # everything in it can be read again
    return table, layout


def _remember(memory: Path, table: FileTable, layout: FolderLayout | None) -> list[str]:
    """Save what is known; a memory that cannot be written costs time only, and is told."""
    files, columns = table.to_columns()
    layout_head, layout_columns = (None, Columns()) if layout is None else layout.to_columns()
    head = {"version": MEMORY_VERSION, "files": files, "layout": layout_head}
    try:
        save_columns(memory, head, {**columns, **layout_columns})
    except OSError as error:
        return [f"the files of {table.root} will be read again next time: {memory} ({error.strerror or error})"]
    table.altered = False
    return []
