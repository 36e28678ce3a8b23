"""What garbage collection would remove, and what it did, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dittocache.embeddings.store.roots import Root


@dataclass(frozen=True)
class GcPlan:
    """What garbage collection would remove.

    Attributes:
        loose, packed: key -> bytes of the records that no living root names.
        by_artifact: name -> (records, bytes) of them; `unreadable` for those without a header.
        too_young: records that no root names either, but that are younger than `min_age_seconds`.
        kept: records that living roots name, and their bytes.
        temporaries, quarantine: files of dead writers, and old records that did not prove themselves.
        dead_roots, living_roots: of the store.
        min_age_seconds: what is younger is kept in any case: its run may not have registered yet.
    """

    loose: dict[str, int]
    packed: dict[str, int]
    by_artifact: dict[str, tuple[int, int]]
    too_young: int
    kept: tuple[int, int]
    temporaries: dict[Path, int]
    quarantine: dict[Path, int]
    dead_roots: Sequence[Root]
    living_roots: Sequence[Root]
    min_age_seconds: float

    @property
    def records(self) -> int:
        """How many records would go."""
        return len(self.loose) + len(self.packed)

    @property
    def bytes(self) -> int:
        """Bytes of everything that would go; those of packed records are free once their packs are written again."""
        return sum(sum(found.values()) for found in (self.loose, self.packed, self.temporaries, self.quarantine))

    def describe(self) -> str:
        """The plan in a few lines for a terminal."""
        count, length = self.kept
        lines = [f"{count} records ({_mb(length)}) are used by {len(self.living_roots)} runs and stay"]
        if not self.living_roots and self.records:
            lines[0] = "no living run is registered in this store: no record counts as used"
        lines.append(f"{self.records} records ({_mb(sum(self.loose.values()) + sum(self.packed.values()))}) are unused")
        lines += [f"  {count:>8} {name} ({_mb(length)})" for name, (count, length) in sorted(self.by_artifact.items())]
        if self.too_young:
            lines.append(f"{self.too_young} unused records are younger than {self.min_age_seconds:.0f} s and stay")
        if self.temporaries:
            lines.append(f"{len(self.temporaries)} half-written files ({_mb(sum(self.temporaries.values()))})")
        if self.quarantine:
            lines.append(f"{len(self.quarantine)} files in quarantine ({_mb(sum(self.quarantine.values()))})")
        lines += [f"run {root.manifest} is gone and would be forgotten" for root in self.dead_roots]
        lines += [
            f"run {root.manifest} of {root.host} cannot be looked at from here and counts as living"
            for root in self.living_roots
            if not root.is_here
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "records": self.records,
            "bytes": self.bytes,
            "by_artifact": {name: {"records": n, "bytes": size} for name, (n, size) in self.by_artifact.items()},
            "too_young": self.too_young,
            "kept": {"records": self.kept[0], "bytes": self.kept[1]},
            "temporaries": {"files": len(self.temporaries), "bytes": sum(self.temporaries.values())},
            "quarantine": {"files": len(self.quarantine), "bytes": sum(self.quarantine.values())},
            "dead_roots": [root.as_dict() for root in self.dead_roots],
            "living_roots": [root.as_dict() for root in self.living_roots],
            "min_age_seconds": self.min_age_seconds,
        }


@dataclass
class GcResult:
    """What garbage collection did: counts and bytes."""

    records: int = 0
    bytes_removed: int = 0
    brought_back: int = 0
    packs_rewritten: int = 0
    packs_removed: int = 0
    files_removed: int = 0
    roots_forgotten: int = 0
    corrupt: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The result in a few lines for a terminal."""
        lines = [f"{self.records} records ({_mb(self.bytes_removed)}) and {self.files_removed} other files are removed"]
        if self.packs_rewritten or self.packs_removed:
            lines.append(f"{self.packs_rewritten} packs were written again, {self.packs_removed} are gone")
        if self.brought_back:
            lines.append(f"{self.brought_back} records are in use by a run that started meanwhile and stay")
        if self.corrupt:
            lines.append(f"{len(self.corrupt)} corrupt records were moved to quarantine; caching again makes them anew")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return dict(vars(self))


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
