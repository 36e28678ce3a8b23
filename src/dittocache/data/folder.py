"""Samples from a folder of pictures, checked in full before any model is loaded.

    SET/training_images/x.png            the target; also images/, target_images/, target/ or targets/
    SET/training_images/x.txt            its caption (UTF-8)
    SET/control_images/x.png             what it is made from; also control/, condition_images/ or controls/
    SET/control_images/x_control_1.png   further control pictures, in the order of their numbers
    SET/control_images/x_mask.png        optional loss mask; it may stand beside the target too

Without a folder of control pictures the set is for text to image. Targets may lie in sub-folders; controls then lie in
sub-folders of the same names. Endings may be those of `pictures.ENDINGS`, in any mixture.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dittocache.data.buckets import bucket_size
from dittocache.data.config import DataConfig
from dittocache.data.pictures import ENDINGS, picture_size
from dittocache.data.sample import Sample
from dittocache.errors import DataError

TARGET_FOLDERS = ("training_images", "images", "target_images", "target", "targets")
CONTROL_FOLDERS = ("control_images", "control", "condition_images", "controls")
_FURTHER_CONTROL = re.compile(r"(?P<base>.+)_control_(?P<number>\d+)")
_MASK = re.compile(r"(?P<base>.+)_mask")


def load_folder(config: DataConfig, size_multiple: int) -> list[Sample]:
    """The samples of `config.path` in the order of their names, each with the (width, height) of its bucket.

    Args:
        config: where the set is, and its resolution in pixels.
        size_multiple: the sides of buckets are multiples of this many pixels (`Family.size_multiple`).

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
    targets = _FolderOfPictures.listed(target_folder, problems)
    controls = None if control_folder is None else _FolderOfPictures.listed(control_folder, problems)
    samples = []
    for name, target in sorted(targets.pictures.items()):
        if targets.accompanies_another(name):
            continue
        sample = _sample(name, target, targets, controls, config, size_multiple, problems)
        if sample is not None:
            samples.append(sample)
    if not samples and not problems:
        problems.append(f"{target_folder} holds no picture; expected files ending in {', '.join(sorted(ENDINGS))}")
    if problems:
        raise DataError(f"the data set {config.path} has {len(problems)} problem(s)", problems)
    return samples


@dataclass(frozen=True)
class _FolderOfPictures:
    """The files of one folder by name: the path inside it without its ending, in Unicode's composed form (NFC)."""

    path: Path
    pictures: Mapping[str, Path]
    captions: Mapping[str, Path]

    @classmethod
    def listed(cls, path: Path, problems: list[str]) -> _FolderOfPictures:
        """List the folder and its sub-folders; hidden files (`.DS_Store`, `._x.png`) are no part of a set."""
        pictures: dict[str, Path] = {}
        captions: dict[str, Path] = {}
        for folder, subfolders, files in os.walk(path, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for file in sorted(files):
                found = Path(folder, file)
                ending = found.suffix.lower()
                if file.startswith(".") or (ending not in ENDINGS and ending != ".txt"):
                    continue
                if not _is_text(str(found)):
                    problems.append(f"{str(found)!r}: the file name is not valid Unicode; rename the file")
                    continue
                listing = captions if ending == ".txt" else pictures
                # A set that was zipped on macOS has decomposed names for some files and composed ones for others.
                name = unicodedata.normalize("NFC", found.relative_to(path).with_suffix("").as_posix())
                if name in listing:
                    problems.append(f"{found}: {listing[name].name} has the same name; rename or remove one of them")
                else:
                    listing[name] = found
        return cls(path, pictures, captions)

    def accompanies_another(self, name: str) -> bool:
        """Whether this picture is a further control or the mask of another picture of this folder."""
        if name in self.captions:
            return False
        match = _FURTHER_CONTROL.fullmatch(name) or _MASK.fullmatch(name)
        return match is not None and match["base"] in self.pictures

    @cached_property
    def further_controls(self) -> Mapping[str, Sequence[Path]]:
        """Pictures named `x_control_N`, by `x` and in the order of N as a number."""
        numbered: dict[str, list[tuple[int, Path]]] = {}
        for name, picture in self.pictures.items():
            match = _FURTHER_CONTROL.fullmatch(name)
            if match is not None:
                numbered.setdefault(match["base"], []).append((int(match["number"]), picture))
        return {base: [picture for _, picture in sorted(pictures)] for base, pictures in numbered.items()}

    def controls_of(self, name: str) -> tuple[Path, ...]:
        """The control pictures of the target `name`: `x`, then `x_control_N` in order."""
        first = [self.pictures[name]] if name in self.pictures else []
        return (*first, *self.further_controls.get(name, ()))


def _sample(
    name: str,
    target: Path,
    targets: _FolderOfPictures,
    controls: _FolderOfPictures | None,
    config: DataConfig,
    size_multiple: int,
    problems: list[str],
) -> Sample | None:
    """One sample, or None after its problems were added to `problems`."""
    found_before = len(problems)
    prompt = _caption(target, targets.captions.get(name), problems)
    masks = [folder.pictures.get(f"{name}_mask") for folder in (targets, controls) if folder is not None]
    mask = next((picture for picture in masks if picture is not None), None)
    control_pictures: tuple[Path, ...] = ()
    if controls is not None:
        control_pictures = controls.controls_of(name)
        if not control_pictures:
            problems.append(f"{target}: no control picture {name}.* in {controls.path}")
    size = _size(target, problems)
    for picture in (*control_pictures, *([mask] if mask else [])):
        _size(picture, problems)
    if len(problems) > found_before or size is None:
        return None
    return Sample(
        name=name,
        target=target,
        controls=control_pictures,
        prompt=prompt,
        size=bucket_size(*size, config.resolution, size_multiple),
        mask=mask,
    )


def _caption(target: Path, caption: Path | None, problems: list[str]) -> str:
    if caption is None:
        problems.append(f"{target}: no caption; expected it in {target.with_suffix('.txt').name} beside it")
        return ""
    try:
        words = caption.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{caption}: the caption cannot be read as UTF-8 ({error})")
        return ""
    if not words:
        problems.append(f"{caption}: the caption is empty")
    return words


def _size(picture: Path, problems: list[str]) -> tuple[int, int] | None:
    try:
        return picture_size(picture)
    except DataError as error:
        problems.append(str(error))
        return None


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


def _is_text(name: str) -> bool:
    """Whether the operating system's bytes for this name are text, so that names can be written to JSON."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
