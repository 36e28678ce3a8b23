"""Which column of a table holds what: by the names that trainers and data sets use, or as the settings say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# In the form of `_plain`: `path_target` and `Target Path` are `target`, `control_file_name` is `control`.
_TARGETS: tuple[str, ...] = ("target", "target_image", "image_target", "edited_image", "output_image", "output")
_TARGETS += ("image", "picture", "img", "file_name", "filename", "file", "path")
_PROMPTS = ("prompt", "text", "caption", "edit_prompt", "instruction", "edit_instruction")
_MASKS = ("mask", "mask_image", "image_mask", "control_mask", "loss_mask")
_CONTROLS: tuple[str, ...] = (
    "control",
    "control_image",
    "controls",
    "control_images",
    "conditioning_image",
    "conditioning_images",
)
_CONTROLS += ("condition_image", "source", "source_image", "source_images", "input_image", "input_images")
_CONTROLS += ("original_image", "reference", "reference_image", "reference_images")
_KNOWN: dict[str, tuple[str, ...]] = {"target": _TARGETS, "controls": _CONTROLS, "prompt": _PROMPTS, "mask": _MASKS}
_SINGLE: tuple[str, ...] = ("target", "prompt", "mask")
_NUMBER = re.compile(r"(?P<name>.*?[a-z])_?(?P<number>\d+)")
_NEAR = 0.8

ColumnSettings = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Roles:
    """The columns that samples are made of.

    Attributes:
        target, prompt, mask: a column each; a table may have no prompt (captions then lie beside the targets) or mask.
        controls: the columns of control pictures in order; a cell may also hold several.
    """

    target: str
    controls: tuple[str, ...]
    prompt: str | None
    mask: str | None

    @property
    def pictures(self) -> tuple[str, ...]:
        """All columns that hold pictures."""
        return (self.target, *self.controls, *([self.mask] if self.mask is not None else []))

    @property
    def all(self) -> tuple[str, ...]:
        """All columns that samples are made of."""
        return (*self.pictures, *([self.prompt] if self.prompt is not None else []))


def find_roles(columns: Sequence[str], settings: ColumnSettings, where: str, problems: list[str]) -> Roles | None:
    """The roles of a table's columns; None, with the reasons in `problems`, where that cannot be told.

    Args:
        settings: role -> column or columns; what they say is not guessed. An empty list says that there is none.
        where: the table, and the place in it that names the columns, for the problems.
    """
    before = len(problems)
    chosen = {role: _chosen(role, settings, columns, where, problems) for role in settings}
    taken = {column for names in chosen.values() for column in names}
    free = [column for column in columns if column not in taken]
    found = {role: chosen[role] if role in chosen else _guessed(role, free) for role in _KNOWN}
    for role in _SINGLE:
        if role not in chosen and len(found[role]) > 1:
            both = " and ".join(repr(column) for column in found[role])
            problems.append(f"{where}: {both} could each be the {role}; say which one with columns.{role}")
    if len(problems) > before:
        return None
    used = {column for names in found.values() for column in names}
    for role, names in found.items():
        if role not in chosen and not names:
            problems += _misspelt(role, [column for column in columns if column not in used], where)
    if not found["target"]:
        problems.append(
            f"{where}: no column of target pictures among {_listed(columns)}; call it 'target' or 'file_name', or say "
            "which one it is with columns.target"
        )
    if len(problems) > before:
        return None
    prompt, mask = next(iter(found["prompt"]), None), next(iter(found["mask"]), None)
    return Roles(found["target"][0], tuple(found["controls"]), prompt, mask)


def _chosen(
    role: str, settings: ColumnSettings, columns: Sequence[str], where: str, problems: list[str]
) -> Sequence[str]:
    """The columns that the settings name for a role."""
    names = [settings[role]] if isinstance(setting := settings[role], str) else list(setting)
    if role != "controls" and len(names) > 1:
        problems.append(f"{where}: columns.{role} names {len(names)} columns; expected one")
    for name in names:
        if name not in columns:
            problems.append(
                f"{where}: no column {name!r}, which columns.{role} names{_did_you_mean(str(name), columns)}; "
                f"there are {_listed(columns)}"
            )
    return [str(name) for name in names]


def _guessed(role: str, columns: Sequence[str]) -> Sequence[str]:
    """The columns whose names say that they have this role; controls by kind of name, then by their numbers."""
    if role != "controls":
        return [column for column in columns if _plain(column) in _KNOWN[role]]
    found: dict[str, list[tuple[int, str]]] = {}
    for column in columns:
        name, number = _plain(column), -1
        if name not in _CONTROLS and (match := _NUMBER.fullmatch(name)):
            name, number = match["name"], int(match["number"])
        if (name := _plain(name)) in _CONTROLS:
            found.setdefault(name, []).append((number, column))
    return [column for numbered in found.values() for _, column in sorted(numbered)]


def _misspelt(role: str, columns: Sequence[str], where: str) -> list[str]:
    """Columns that look like a slip in the name of one that would have this role."""
    problems = []
    for column in columns:
        near = difflib.get_close_matches(_plain(column), _KNOWN[role], n=1, cutoff=_NEAR)
        known_elsewhere = any(_plain(column) in names for names in _KNOWN.values())
        if near and not known_elsewhere:
            problems.append(
                f"{where}: column {column!r} is not known; did you mean {near[0]!r}? Rename it, or say what holds the "
                f"{role} with columns.{role} ([] for none)"
            )
    return problems


def _plain(column: str) -> str:
    """A column's name without what trainers put around it."""
    name = re.sub(r"[\s\-.]+", "_", column.strip().lower())
    if name in ("file_name", "path"):
        return name
    for ending in ("_file_names", "_file_name", "_paths", "_path"):
        name = name.removesuffix(ending)
    return name.removeprefix("path_")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"
