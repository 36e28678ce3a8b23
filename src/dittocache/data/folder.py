"""Samples from a folder of pictures, checked in full before any model is loaded.

    SET/training_images/x.png            the target; also images/, target_images/, target/ or targets/
    SET/training_images/x.txt            its caption (UTF-8)
    SET/control_images/x.png             what it is made from; also control/, condition_images/ or controls/
    SET/control_images/x_control_1.png   further control pictures, in the order of their numbers
    SET/control_images/x_mask.png        optional loss mask; it may stand beside the target too

Targets and captions may also lie in SET itself. Without a folder of control pictures the set is for text to image.
Targets may lie in sub-folders; controls then lie in sub-folders of the same names. Endings may be those of
`pictures.ENDINGS`, in any mixture.

With a folder for its memory, what was read of an unchanged file is not read again (`file_table.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dittocache.data.checks import sample_problems
from dittocache.data.config import SetConfig
from dittocache.data.file_memory import remember, remembered
from dittocache.data.file_samples import FileSamples
from dittocache.data.file_table import FileTable
from dittocache.data.folder_layout import Naming, find_layout
from dittocache.data.pictures import ENDINGS
from dittocache.data.scan import prefix_below
from dittocache.data.variants import Treatment, treatment_of
from dittocache.errors import DataError

TARGET_FOLDERS = ("training_images", "images", "target_images", "target", "targets")
CONTROL_FOLDERS = ("control_images", "control", "condition_images", "controls")


@dataclass(frozen=True)
class FolderPlace:
    """The folders that hold a set.

    Attributes:
        path: what the settings name.
        targets: the folder of targets and captions.
        controls: that of control pictures; None for text to image.
        deep: whether sub-folders belong to them.
        numbered: as in `Naming`.
        caption_ending: of captions, with its dot.
    """

    path: Path
    targets: Path
    controls: Path | None
    deep: bool = True
    numbered: bool = False
    caption_ending: str = ".txt"

    @property
    def root(self) -> Path:
        """The folder that holds them all: `path` where it does."""
        folders = [folder for folder in (self.targets, self.controls) if folder is not None]
        if all(folder.is_relative_to(self.path) for folder in folders):
            return self.path
        return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def is_folder_of_targets(path: Path) -> bool:
    """Whether there is a folder of targets in it, so that nothing else that lies there makes it a list."""
    return any((path / name).is_dir() for name in TARGET_FOLDERS)


def load_folder(config: SetConfig, size_multiple: int, memory: Path | None = None) -> FileSamples:
    """The samples of the folder `config.path` in the order of their names.

    Args:
        config: where the set is, and what is made of it.
        size_multiple: the sides of buckets are multiples of this many pixels (`Family.size_multiple`).
        memory: folder in which what is read is remembered for the next time; a damaged memory is started afresh, one
            that cannot be written is noted in `FileSamples.notes`.

    Raises DataError listing every problem of the set: missing or empty captions, pictures that cannot be read, missing
    controls, no samples at all.
    """
    return load_place(folder_place(config), treatment_of(config, size_multiple, config.side), memory)


def folder_place(config: SetConfig, flat: bool = False) -> FolderPlace:
    """Where in `config.path` targets and controls are; raises DataError listing what is missing or there twice.

    Args:
        flat: True looks for targets in `config.path` itself and in no sub-folder, and takes `x_N` for a control of `x`,
            as musubi-tuner does.
    """
    path, ending = config.path, config.caption_extension
    problems = [] if path.is_dir() else [f"{path} is not a folder; set data.path to the folder of the data set"]
    if config.control_path is not None and not config.control_path.is_dir():
        problems.append(f"{config.control_path} is not a folder; it was named as that of the control pictures")
    if ending.lower() in ENDINGS:
        problems.append(f"caption_extension {ending} is that of pictures; expected that of text files, such as .txt")
    if problems:
        raise DataError(f"the data set {path} cannot be used", problems)
    if flat or config.control_path is not None:
        if config.control_path is not None and config.control_path.resolve() == path.resolve():
            raise DataError(f"{path} is named as the folder of targets and of controls; they need a folder each")
        return FolderPlace(path, path, config.control_path, not flat, flat, ending)
    targets = _layout_folder(path, TARGET_FOLDERS, problems)
    controls = _layout_folder(path, CONTROL_FOLDERS, problems)
    if problems:
        raise DataError(f"the data set {path} cannot be used", problems)
    return FolderPlace(path, path if targets is None else targets, controls, True, False, ending)


def load_place(place: FolderPlace, treatment: Treatment, memory: Path | None) -> FileSamples:
    """As `load_folder`, from folders that are known."""
    problems: list[str] = []
    samples = read_place(place, treatment, memory, problems)
    if problems:
        raise DataError(f"the data set {place.path} has {len(problems)} problem(s)", problems)
    return samples


def read_place(place: FolderPlace, treatment: Treatment, memory: Path | None, problems: list[str]) -> FileSamples:
    """The samples of folders that are known, those that cannot be used included: what is wrong goes to `problems`."""
    root, name = place.root, _name(place)
    folders = [place.targets, *([place.controls] if place.controls is not None else [])]
    if place.root != place.path:
        folders = [Path(os.path.abspath(folder)) for folder in folders]
    known_endings = {*ENDINGS, "." + place.caption_ending.lower().rpartition(".")[2]}
    table = FileTable.scanned(root, folders, lambda ending: ending not in known_endings, place.deep)
    known, known_layout = remembered(memory, name, root)
    table.learn(known)
    if known_layout is not None and known.names == table.names:
        layout = known_layout
    else:
        controls = None if place.controls is None else prefix_below(root, folders[1])
        naming = Naming(prefix_below(root, folders[0]), controls, place.caption_ending, place.numbered)
        layout = find_layout(table, naming, problems)
    samples = FileSamples(table, layout, treatment, name, memory)
    problems += sample_problems(samples, place.controls, place.caption_ending)
    if not problems and not len(samples):
        problems.append(_nothing(place))
    remember(samples, layout=not problems)  # a layout with problems is found again, and they with it
    return samples


def _nothing(place: FolderPlace) -> str:
    endings = ", ".join(sorted(ENDINGS))
    if place.targets == place.path and place.deep:
        return (
            f"the data set {place.path} has no folder of target pictures; expected one of "
            f"{', '.join(TARGET_FOLDERS)} inside it, or pictures in itself: files ending in {endings}"
        )
    return f"{place.targets} holds no picture; expected files ending in {endings}"


def _layout_folder(path: Path, names: Sequence[str], problems: list[str]) -> Path | None:
    """The one folder of these names inside `path`; None when there is none."""
    present = [path / name for name in names if (path / name).is_dir()]
    if len(present) > 1:
        problems.append(f"{' and '.join(folder.name for folder in present)} both exist; keep one of them")
    return present[0] if present else None


def _name(place: FolderPlace) -> str:
    """`FileSamples.place`: what is remembered of the same folders, read in the same way."""
    folders = [None if folder is None else str(folder.resolve()) for folder in (place.targets, place.controls)]
    return json.dumps([*folders, str(place.path.resolve()), place.deep, place.numbered, place.caption_ending])
