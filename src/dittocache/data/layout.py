"""Which files are which sample's target, caption, mask and controls, as rows of a table of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dittocache.data.columns import Columns
from dittocache.data.file_table import Rows

ABSENT = -1


@dataclass(frozen=True)
class Layout:
    """The samples of a set, in order, by the rows of their files in its table.

    Attributes:
        names: the path inside the target folder without its ending, in Unicode's composed form (NFC).
        targets, captions, masks: a row for each sample; -1 where it has none.
        control_starts: where each sample's controls begin in `controls`, and where the last one's end.
        controls: rows, sample after sample, in order.
        prompts: the captions of a set that has no files for them.
    """

    names: Sequence[str]
    targets: Rows
    captions: Rows
    masks: Rows
    control_starts: Rows
    controls: Rows
    prompts: Sequence[str] | None = None

    def controls_of(self, number: int) -> list[int]:
        """The rows of one sample's controls."""
        rows: list[int] = self.controls[self.control_starts[number] : self.control_starts[number + 1]].tolist()
        return rows

    @property
    def pictures(self) -> Rows:
        """The rows of all pictures."""
        return np.concatenate([self.targets, self.controls, self.masks[self.masks != ABSENT]])

    def to_columns(self) -> tuple[dict[str, object], Columns]:
        """The layout, for `save_columns`; without `prompts`, which the set itself holds."""
        columns: Columns = {
            "layout.targets": self.targets,
            "layout.captions": self.captions,
            "layout.masks": self.masks,
            "layout.control_starts": self.control_starts,
            "layout.controls": self.controls,
        }
        return {"names": list(self.names)}, columns

    @classmethod
    def from_columns(cls, head: Mapping[str, Sequence[str]], columns: Mapping[str, npt.NDArray[np.generic]]) -> Layout:
        """The reverse."""

        def rows(name: str) -> Rows:
            return columns[f"layout.{name}"].astype(np.int64, copy=False)

        starts, controls = rows("control_starts"), rows("controls")
        return cls(head["names"], rows("targets"), rows("captions"), rows("masks"), starts, controls)


def layout_of(
    names: Sequence[str],
    targets: Sequence[int],
    captions: Sequence[int],
    masks: Sequence[int],
    controls: Sequence[Sequence[int]],
    prompts: Sequence[str] | None = None,
) -> Layout:
    """A layout from the rows of each sample; `ABSENT` where it has no such file."""
    starts = np.zeros(len(names) + 1, np.int64)
    np.cumsum([len(rows) for rows in controls], out=starts[1:])
    return Layout(
        names,
        np.array(targets, np.int64),
        np.array(captions, np.int64),
        np.array(masks, np.int64),
        starts,
        np.array([row for rows in controls for row in rows], np.int64),
        prompts,
    )
