"""A plan in words and as JSON values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dittocache.embeddings.planning.plan import Plan


def describe(plan: Plan) -> str:
    """The plan in a few lines for a terminal."""
    samples, records = len(plan.manifest.table.names), plan.hits + plan.misses
    lines = [f"{samples} samples need {records} records: {plan.hits} are cached ({_megabytes(plan.bytes_stored)})"]
    lines[0] += f", {plan.misses} are to be encoded" if plan.misses else ": nothing is left to encode"
    for one in plan.missed.by_cause:
        words = f"  {one.records:>6} {'stale: ' if one.stale else ''}{one.cause}"
        lines.append(f"{words} ({_some(one.samples)})" if one.stale else words)
    if plan.misses:
        lines.append(_forecast(plan))
    if plan.removed:
        lines.append(
            f"{len(plan.removed)} samples are no longer in the data set and will not be trained on "
            f"({_some(plan.removed[:4])})"
        )
    if plan.orphans:
        lines.append(f"{plan.orphans} stored records are no longer used by this data set")
    return "\n".join([*lines, *plan.notes])


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `to_encode` counts samples by encoder (`none` for plain facts)."""
    return {
        "samples": len(plan.manifest.table.names),
        "hits": plan.hits,
        "misses": plan.misses,
        "bytes_stored": plan.bytes_stored,
        "bytes_to_write": None if plan.bytes_to_write is None else plan.bytes_to_write.total,
        "bytes_to_write_by_artifact": None if plan.bytes_to_write is None else dict(plan.bytes_to_write.by_artifact),
        "seconds_to_encode": dict(plan.seconds_to_encode),
        "causes": {f"stale: {one.cause}" if one.stale else one.cause: one.records for one in plan.missed.by_cause},
        "examples": {one.cause: list(one.samples) for one in plan.missed.by_cause},
        "stale": [{"sample": one.sample, "artifact": one.artifact, "cause": one.cause} for one in plan.stale],
        "to_encode": {encoder or "none": len(plan.missing(encoder)) for encoder in plan.needs},
        "removed": list(plan.removed),
        "orphans": plan.orphans,
        "notes": list(plan.notes),
    }


def _forecast(plan: Plan) -> str:
    """Bytes and time still to come, as far as they are known."""
    estimate = plan.bytes_to_write
    size = "an unknown size" if estimate is None else f"about {_megabytes(estimate.total)}"
    known = {encoder: seconds for encoder, seconds in plan.seconds_to_encode.items() if seconds is not None}
    unknown = [encoder for encoder in plan.seconds_to_encode if encoder not in known]
    time = f", about {_duration(sum(known.values()))} ({', '.join(known)})" if known else ""
    missing = f"; how long {' and '.join(unknown)} will take is not known yet" if unknown else ""
    return f"still to write: {size}{time}{missing}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _some(names: tuple[str, ...] | list[str] | Any) -> str:
    """A few names, and whether there are more."""
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
