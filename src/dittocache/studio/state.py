"""What the Studio knows: where it may read and write, and the settings that are being edited. Nothing about runs.

How a run stands is read from its folder each time it is asked for, so a page cannot show what is no longer so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig
from dittocache.studio.access import Access
from dittocache.studio.draft import Draft
from dittocache.studio.roots import Roots
from dittocache.studio.worker import Worker, WorkerProcesses

HOME_NAME = ".dittocache-studio"
DRAFT_NAME = "draft.json"
THUMBNAILS_NAME = "thumbnails"


@dataclass(frozen=True)
class Studio:
    """One running Studio, given to every page.

    Attributes:
        roots: the folders that may be read and written; relative paths start from the first.
        access: who may reach it, and where it listens.
        memory: what pages keep between visits to be quick; losing it costs time only.
        worker: where to run what needs torch or takes long: `await studio.worker.run(function, studio)`. There, a
            Studio has its folders and its draft, and neither memory nor worker.
    """

    roots: Roots
    access: Access
    memory: dict[str, Any] = field(default_factory=dict)
    worker: Worker = field(default_factory=WorkerProcesses)

    def __reduce__(self) -> tuple[type[Studio], tuple[Roots, Access]]:
        return Studio, (self.roots, self.access)

    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self.roots.folders[0]

    @property
    def home(self) -> Path:
        """Where the Studio keeps its draft and thumbnails."""
        return self.base / HOME_NAME

    @property
    def thumbnails(self) -> Path:
        """Where small pictures are kept."""
        return self.home / THUMBNAILS_NAME

    @cached_property
    def draft(self) -> Draft:
        """The settings that are being edited."""
        return Draft(self.home / DRAFT_NAME)

    @property
    def runs_dir(self) -> Path:
        """The folder of runs, as the draft says, else the usual one; raises AccessError outside all roots."""
        named = self.draft.given.get("output_dir")
        return self.path(named if isinstance(named, str) and named else RunConfig.model_fields["output_dir"].default)

    def path(self, named: str | Path) -> Path:
        """The path, absolute and with every link followed; relative ones start from the first root.

        Raises AccessError where it is outside all roots.
        """
        return self.roots.allowed(self.base / Path(named).expanduser())

    def config(self, extra: Mapping[str, Any] | None = None) -> RunConfig:
        """The draft as settings that were checked, `extra` by dotted name on top; raises ConfigError."""
        return self.draft.config(extra)
