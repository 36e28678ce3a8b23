"""What an import found and did, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 10  # refused files that are listed one by one


@dataclass(frozen=True)
class Refusal:
    """A record that cannot be imported.

    Attributes:
        sample, artifact: what it would have been.
        reason: why.
        absent: True where the folder has no such file; False where it has one that must not be used.
    """

    sample: str
    artifact: str
    reason: str
    absent: bool


@dataclass(frozen=True)
class Comparison:
    """An imported tensor beside the one that the plan's encoder computes.

    Attributes:
        relative_rms: root mean square of the difference over that of the computed one; infinite where shapes differ.
        worst_token_cosine: smallest cosine between a row and its counterpart.
    """

    sample: str
    artifact: str
    relative_rms: float
    worst_token_cosine: float


@dataclass
class ImportResult:
    """What an import found, and unless it was a dry run, did.

    Attributes:
        tool, folder: whose cache it was, and where.
        dry_run: nothing was written.
        imported: records that were, or in a dry run would be, written to the store.
        bytes_imported: of their tensors.
        already_stored: records that the plan needs and the store had.
        refused: the other records that the plan needs.
        notes: what was changed on the way -> records.
        verified, unverified: what the files allowed to check, and what not.
        compared: with `check`, tensors beside freshly encoded ones.
        seconds: wall time.
    """

    tool: str
    folder: str
    dry_run: bool
    imported: int = 0
    bytes_imported: int = 0
    already_stored: int = 0
    refused: list[Refusal] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    verified: Sequence[str] = ()
    unverified: Sequence[str] = ()
    compared: list[Comparison] = field(default_factory=list)
    seconds: float = 0.0

    def describe(self) -> str:
        """The result in a few lines for a terminal; what could not be verified stands last and cannot be overlooked."""
        verb = "can be imported" if self.dry_run else "imported"
        lines = [f"{self.tool}, {self.folder}: {self.imported} records ({self.bytes_imported / 1e6:.1f} MB) {verb}"]
        lines[0] += f", {len(self.refused)} cannot; {self.already_stored} are stored already"
        lines += [f"  {count:>6} {note}" for note, count in self.notes.most_common()]
        for absent, title in ((True, "not in the folder"), (False, "refused")):
            lines += _grouped(title, [one for one in self.refused if one.absent == absent])
        if self.compared:
            worst = max(one.relative_rms for one in self.compared)
            lines.append(f"Compared with the encoders: {len(self.compared)} tensors, worst relative RMS {worst:.2g}")
        lines += ["Verified:", *(f"  - {one}" for one in self.verified)]
        return "\n".join([*lines, "NOT VERIFIED, and taken on trust:", *(f"  - {one}" for one in self.unverified)])

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        fields: Mapping[str, Any] = asdict(self)
        return {
            **fields,
            "notes": dict(self.notes),
            "verified": list(self.verified),
            "unverified": list(self.unverified),
        }


def _grouped(title: str, refusals: Sequence[Refusal]) -> list[str]:
    """How many records, for which reasons, and the first few by name."""
    if not refusals:
        return []
    counts = Counter(one.reason.partition(": ")[2] or one.reason for one in refusals)
    lines = [f"{title}: {len(refusals)} records"]
    lines += [f"  {count:>6} {reason}" for reason, count in counts.most_common(SHOWN)]
    lines += [f"         {one.sample}, {one.artifact}" for one in refusals[:SHOWN]]
    return [*lines, f"         and {len(refusals) - SHOWN} more"] if len(refusals) > SHOWN else lines
