"""What is wrong with the files that samples are made of: all of it, before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dittocache.data.file_samples import FileSamples
from dittocache.data.file_table import FileTable
from dittocache.data.layout import ABSENT
from dittocache.errors import DataError


def sample_problems(samples: FileSamples, control_folder: Path | None, caption_ending: str) -> list[str]:
    """Read what is not known of the files that samples are made of, and tell what is wrong with them, by sample.

    Args:
        control_folder: where every sample must have a control; None where none is needed.
        caption_ending: of the files that captions were looked for in.
    """
    table, layout = samples.table, samples.layout
    table.read_sizes(layout.pictures)
    unread: npt.NDArray[np.bool_] = np.logical_not(table.sizes.all(axis=1))
    wanting = np.zeros(len(layout.names), np.bool_)
    if len(wanting):
        wanting |= unread[layout.targets] | ((layout.masks != ABSENT) & unread[layout.masks])
    counts = np.diff(layout.control_starts)
    if control_folder is not None:
        wanting |= counts == 0
    wanting[np.repeat(np.arange(len(wanting)), counts)[unread[layout.controls]]] = True
    if layout.prompts is None:
        has_text = np.zeros(len(table.names) + 1, np.bool_)  # one more, where the row of an absent caption points
        has_text[[row for row, text in table.texts.items() if text]] = True
        wanting |= ~has_text[layout.captions]
    problems: list[str] = []
    for number in np.flatnonzero(wanting).tolist():
        problems += _problems_of(samples, number, control_folder, caption_ending)
    return problems


def _problems_of(samples: FileSamples, number: int, control_folder: Path | None, caption_ending: str) -> list[str]:
    table, layout = samples.table, samples.layout
    row, mask, controls = int(layout.targets[number]), int(layout.masks[number]), layout.controls_of(number)
    target = table.path(row)
    found: list[str] = []
    if layout.prompts is None:
        found += _caption_problems(table, int(layout.captions[number]), target, caption_ending)
    if control_folder is not None and not controls:
        found.append(f"{target}: no control picture {layout.names[number]}.* in {control_folder}")
    for picture in (row, *controls, *([mask] if mask != ABSENT else [])):
        try:
            table.size(picture)
        except DataError as error:
            found.append(str(error))
    return found


def _caption_problems(table: FileTable, caption: int, target: Path, caption_ending: str) -> list[str]:
    if caption == ABSENT:
        return [f"{target}: no caption; expected it in {target.stem}{caption_ending} beside it"]
    try:
        words = table.text(caption)
    except DataError as error:
        return [str(error)]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{table.path(caption)}: the caption cannot be read as UTF-8 ({error})"]
    return [] if words else [f"{table.path(caption)}: the caption is empty"]
